"""python -m gan pegasus: the routes of all runs, their judgement beside the controls, files and the page."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from gan import acai, acai_experiment, diagram, experiment, pegasus
from gan.acai_config import AutoencoderConfig
from gan.acai_experiment import Trained as Autoencoder
from gan.config import Config
from gan.model import Gan
from gan.pegasus import BIRD, HORSE, Candidates, Jury, Scores
from gan.sampling import Trained as Generator
from lib import images
from lib.process import UserError
from lib.report import Page, number, summary
from lib.run import RunFolder, write_json, write_text

if TYPE_CHECKING:
    from gan.__main__ import Pegasus

_BEST, _BATCH = 16, 64
_LOG = "tried.jsonl"
_MAIN = ("h", "h_above_half", "h_most", "h_guide", "kid", "precision", "distance", "diversity")
PROTOCOL = (
    "h: sqrt(p_bird p_horse) by {judge} (calibrated, one-vs-rest), which guided nothing and chose nothing; mean, share "
    "at least 0.5, and largest. h_guide: by {guides} (geometric mean over them and over 4 views of an image, shifted "
    "and mirrored), which guided the optimisation and chose the images that are shown. Features of cifar10_cnn, "
    "against the 10,000 training images of birds and horses: kid (kid_of_real: that of test birds and horses), "
    "precision, and distance: mean distance of an image to its 5 nearest training images, median over images, where "
    "real test images have 1. diversity: mean distance between two images, where real ones have 1. Every set has "
    "{count} images with seed {seed}, unselected; chosen images are the ones with the highest h_guide among those of "
    "distance at most {distance:g}."
)
DISCUSSION = (
    "No image of the data is both a bird and a horse, so nothing can learn what one looks like; each route asks for it "
    "where the model has to generalise. mixed asks between two rows of the generator's conditional norms: what both "
    "classes share (background, pose, colour) stays, what differs is averaged in every layer. optimised stays on what "
    "the generator can make, and looks there for what the guides take for both; their own blind spots are its danger, "
    "which is why there are two of them, and why another network, of another architecture, judges. interpolated mixes "
    "two real images in latents whose mixtures a critic was trained to find nothing in; it is faithful to its two "
    "images, and as blurred as an autoencoder. moved begins with these mixtures, which are images already, and follows "
    "the guides from there, not far.",
    "H alone is easily fooled: pixel blends of a bird and a horse are a control for that. So an image has to be near "
    "the data too, by the features of a third network, and images are chosen without the judge.",
)


Made = tuple[str, str, Candidates]
"""(kind of route, how in words, candidates)"""


@dataclasses.dataclass(frozen=True)
class Route:
    """What one run made in one way."""

    name: str
    """of its own"""
    how: str
    candidates: Candidates
    scores: Scores
    chosen: np.ndarray
    """[at most _BEST]: the candidates that are shown, the best one first"""


def write(
    runs: Sequence[tuple[RunFolder, Config | AutoencoderConfig]], options: Pegasus, say: Callable[[str], None]
) -> str:
    """Writes best.png, batch64.png, candidates.png, pegasus.json and index.html to options.out; returns a summary."""
    for folder, config in runs:
        _check(folder, config)
    jury = Jury(options.guides, options.judge)
    out = options.out
    made: list[Made] = []
    controls, models = _controls(options), {}
    for folder, config in runs:
        name = folder.path.name
        say(f"{name}: {options.count} candidates of each route")
        if isinstance(config, AutoencoderConfig):
            trained = acai_experiment.open_run(config, folder)
            models[name] = _parts_of_autoencoder(trained)
            candidates = pegasus.interpolated(trained, options.count, options.seed)
            if config.autoencoder.critic:
                made.append(("interpolated", f"ACAI, {name}", candidates))
                moved = pegasus.moved(trained, options.guides, options.count, options.seed, options.steps)
                made.append(("moved", f"ACAI, {name}, {_towards(options)}", moved))
            else:
                controls["autoencoder_blends"] = candidates.pixels
        else:
            trained = experiment.open_run(config, folder, ["best"])["best"]
            made += _of_generator(name, trained, config, options)
            models[name] = _parts_of_gan(trained.model)
    if not made:
        raise UserError("none of these runs is a route to a pegasus: give a generator of cifar10 or an ACAI run")
    routes = _judged(made, jury, options, say)
    numbers: dict[str, Any] = {}
    for name, scores in [
        *((route.name, route.scores) for route in routes),
        *((name, jury.scores(pixels)) for name, pixels in controls.items()),
    ]:
        numbers |= {f"{name}.{k}": v for k, v in jury.numbers(scores).items()}
    shown = [route for route in routes if len(route.chosen)]
    if not shown:
        raise UserError(f"all candidates are farther than {options.most_distant:g} from the data: raise --most-distant")
    winner = max(shown, key=lambda route: route.scores.guided[route.chosen[0]])
    record = {
        "n": options.count,
        "seed": options.seed,
        "runs": [folder.path.name for folder, _ in runs],
        "routes": {route.name: route.how for route in routes},
        "best": _best(winner),
        "best_of_each_route": {route.name: _best(route) for route in shown},
        "numbers": numbers,
        "protocol": _protocol(options),
    }
    figures = _figures(out, routes, winner, controls, jury)
    for name, columns in models.items():
        figures.append((diagram.draw(out / f"model_{name}.png", columns), f"The networks of {name}."))
    write_json(out / "pegasus.json", record)
    np.savez(out / "scores.npz", **_all_scores(routes))
    tried = _log(out, record, options)
    _page(out, record, figures, tried)
    return summary(numbers, _MAIN) + f"\n\nbest: {_told(record['best'])}\n{out / 'index.html'}"


def _judged(made: Sequence[Made], jury: Jury, options: Pegasus, say: Callable[[str], None]) -> list[Route]:
    """Routes of the same kind are numbered."""
    kinds = [kind for kind, _, _ in made]
    routes = []
    for i, (kind, how, candidates) in enumerate(made):
        say(f"judging {kind} ({how})")
        scores = jury.scores(candidates.pixels)
        chosen = pegasus.choose(scores, _BEST, options.most_distant)
        routes.append(Route(kind if kinds.count(kind) == 1 else f"{kind}-{i}", how, candidates, scores, chosen))
    return routes


def _check(folder: RunFolder, config: Config | AutoencoderConfig) -> None:
    """Raises UserError for a run that has not learned birds and horses."""
    if config.data.source != "cifar10":
        raise UserError(f"{folder.path} was trained on {config.data.source}, not on cifar10")
    if config.data.labels and not {BIRD, HORSE} <= set(config.data.labels):
        raise UserError(f"{folder.path} knows no birds and horses: they are the classes {BIRD} and {HORSE} of cifar10")


def _of_generator(name: str, trained: Generator, config: Config, options: Pegasus) -> list[Made]:
    labels = config.data.labels or tuple(range(10))
    classes = (labels.index(BIRD), labels.index(HORSE)) if trained.model.classes else None
    count, seed = options.count, options.seed
    found = [
        (
            "optimised",
            f"{name}, {_towards(options)}",
            pegasus.optimised(trained, classes, options.guides, count, seed, options.steps),
        )
    ]
    if classes is not None:
        found.insert(0, ("mixed", f"{name}, classes mixed", pegasus.mixed(trained, classes, count, seed)))
    return found


def _towards(options: Pegasus) -> str:
    return f"{options.steps} steps towards {' and '.join(options.guides)}"


def _controls(options: Pegasus) -> dict[str, np.ndarray]:
    return {
        "real_birds": pegasus.real("test", BIRD),
        "real_horses": pegasus.real("test", HORSE),
        "pixel_blends": pegasus.blended(options.count, options.seed).pixels,
    }


def _best(route: Route) -> dict[str, Any]:
    """Of the first of a route's chosen images."""
    i, s = int(route.chosen[0]), route.scores
    return {
        "route": route.name,
        "index": i,
        "share_of_horse": float(route.candidates.shares[i]),
        "h": float(s.hybrid[i]),
        "bird": float(s.bird[i]),
        "horse": float(s.horse[i]),
        "h_guide": float(s.guided[i]),
        "distance": float(s.distance[i]),
    }


def _all_scores(routes: Sequence[Route]) -> dict[str, np.ndarray]:
    """{"ROUTE.h": [n], ...} of all candidates, in their order."""
    names = {"h": "hybrid", "h_guide": "guided", "bird": "bird", "horse": "horse", "distance": "distance"}
    found = {f"{r.name}.{name}": getattr(r.scores, field) for r in routes for name, field in names.items()}
    return found | {f"{r.name}.share_of_horse": r.candidates.shares for r in routes}


def _told(best: dict[str, Any]) -> str:
    return (
        f"{best['route']} number {best['index']}: H {best['h']:.2f} (bird {best['bird']:.2f}, horse "
        f"{best['horse']:.2f}; by the guides {best['h_guide']:.2f}), distance {best['distance']:.2f} times that of "
        "real images"
    )


def _figures(
    out: Path, routes: Sequence[Route], winner: Route, controls: dict[str, np.ndarray], jury: Jury
) -> list[tuple[Path, str]]:
    i = int(winner.chosen[0])
    pair = np.stack([winner.candidates.pixels[i], jury.train[winner.scores.neighbour[i]]])
    names = ", ".join(route.name for route in routes)
    figures = [
        (
            _write(out / "best.png", pair[:1], least_height_px=256),
            f"The chosen image of the route with the highest guides' H: {_told(_best(winner))}.",
        ),
        (
            _write(out / "best_neighbour.png", pair, least_height_px=256),
            "It, and the training image nearest to it in feature space.",
        ),
        (
            _write(out / "batch64.png", winner.candidates.pixels[:_BATCH], columns=16),
            f"The first {_BATCH} candidates of that route ({winner.name}), unselected.",
        ),
        (
            _write(
                out / "candidates.png",
                np.concatenate([_row(route) for route in routes]),
                columns=_BEST,
            ),
            f"The {_BEST} chosen images of each route (black where there are fewer), a row each: {names}.",
        ),
    ]
    for route in routes:
        if route is not winner:
            path = _write(out / f"batch64_{route.name}.png", route.candidates.pixels[:_BATCH], columns=16)
            figures.append((path, f"The first {_BATCH} candidates of the route {route.name}, unselected."))
    rows = np.concatenate([pixels[:_BEST] for pixels in controls.values()])
    path = _write(out / "controls.png", rows, columns=_BEST)
    return [*figures, (path, f"Controls, a row each: {', '.join(controls)}.")]


def _row(route: Route) -> np.ndarray:
    """[_BEST, h, w, c]: the chosen images, and black ones where there are fewer."""
    chosen = route.candidates.pixels[route.chosen]
    return np.concatenate([chosen, np.zeros((_BEST - len(chosen), *chosen.shape[1:]), chosen.dtype)])


def _write(path: Path, pixels: np.ndarray, **options: int) -> Path:
    """A grid of uint8 images."""
    return images.write(path, images.grid(images.from_uint8(pixels), **options))


def _parts_of_gan(model: Gan) -> dict[str, list[diagram.Part]]:
    z, x = jnp.zeros((2, model.latent)), jnp.zeros((2, *model.shape))
    y = jnp.zeros((2, model.classes)) if model.classes else None
    return {
        "generator": diagram.parts(model.generator, z, y, True),
        "critic": diagram.parts(model.critic, x, y, True),
    }


def _parts_of_autoencoder(trained: Autoencoder) -> dict[str, list[diagram.Part]]:
    nets = acai.networks(trained.model.options, trained.facts.shape[-1])
    return {name: diagram.parts(net, jnp.zeros(shape)) for name, (net, shape) in nets.items()}


def _protocol(options: Pegasus) -> str:
    return PROTOCOL.format(
        judge=options.judge,
        guides=" and ".join(options.guides),
        count=options.count,
        seed=options.seed,
        distance=options.most_distant,
    )


def _log(out: Path, record: dict[str, Any], options: Pegasus) -> list[dict[str, Any]]:
    """Appends this attempt to the log of the folder; returns all of them. Only what one judge says is compared."""
    path = out / _LOG
    tried = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    best = {key: record["best"][key] for key in ("route", "h", "h_guide", "distance")}
    before = max((row["h"] for row in tried if row.get("judge", options.judge) == options.judge), default=None)
    tried.append(
        {
            "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "runs": record["runs"],
            "n": record["n"],
            "seed": record["seed"],
            "steps": options.steps,
            "guides": list(options.guides),
            "judge": options.judge,
            "most_distant": options.most_distant,
            **best,
            "improved_h_by": None if before is None else best["h"] - before,
        }
    )
    write_text(path, "".join(json.dumps(row) + "\n" for row in tried))
    return tried


def _page(
    out: Path, record: dict[str, Any], figures: Sequence[tuple[Path, str]], tried: Sequence[dict[str, Any]]
) -> None:
    page = Page("A pegasus", "Generated from CIFAR-10's birds and horses, by several routes, measured and unselected.")
    for path, caption in figures[:4]:
        page.figure(path, caption)
    page.numbers(record["numbers"], record["protocol"])
    page.heading("Routes")
    for name, how in record["routes"].items():
        best = record["best_of_each_route"].get(name)
        page.text(f"{name}: {how}. {f'Its chosen image: {_told(best)}' if best else 'Nothing is near enough to data'}.")
    for path, caption in figures[4:]:
        page.figure(path, caption)
    page.heading("Discussion")
    for text in DISCUSSION:
        page.text(text)
    page.heading("What was tried")
    page.table(
        ["", "when", "runs", "N", "route", "H", "H by the guides", "distance", "change of the best H"],
        [
            [str(i + 1), row["utc"], ", ".join(row["runs"]), str(row["n"]), row["route"], number(row["h"]),
             number(row["h_guide"]), number(row["distance"]),
             "" if row["improved_h_by"] is None else f"{row['improved_h_by']:+.3f}"]
            for i, row in enumerate(tried)
        ],
    )  # fmt: skip
    page.code(json.dumps(record, indent=2), summary="all numbers")
    page.write(out / "index.html")
