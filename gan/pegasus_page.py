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

from gan import acai_experiment, diagram, experiment, pegasus
from gan.acai_config import AutoencoderConfig
from gan.config import Config
from gan.pegasus import BIRD, HORSE, Candidates, Jury, Scores
from lib import images
from lib.report import Page, metric_table, number, summary
from lib.run import RunFolder, UserError, write_json, write_text

if TYPE_CHECKING:
    from gan.__main__ import Pegasus

_BEST, _BATCH = 16, 64
_LOG = "tried.jsonl"
_MAIN = ("h", "h_above_half", "h_most", "h_guide", "kid", "precision", "distance", "diversity")
PROTOCOL = (
    "h: sqrt(p_bird p_horse) by {judge} (calibrated, one-vs-rest), which guided nothing and chose nothing; mean, share "
    "at least 0.5, and largest. h_guide: by {guide}, which guided the optimisation and chose the images that are "
    "shown. Features of cifar10_cnn, against the 10,000 training images of birds and horses: kid (kid_of_real: that "
    "of test birds and horses), precision, and distance: mean distance of an image to its 5 nearest training images, "
    "median over images, where real test images have 1. diversity: mean distance between two images, where real ones "
    "have 1. Every set has {count} images with seed {seed}, unselected; chosen images are the ones with the highest "
    "h_guide among those of distance at most {distance:g}."
)
DISCUSSION = (
    "No image of the data is both a bird and a horse, so nothing can learn what one looks like; each route asks for it "
    "where the model has to generalise. mixed asks between two rows of the generator's conditional norms: what both "
    "classes share (background, pose, colour) stays, what differs is averaged in every layer. optimised stays on what "
    "the generator can make, and looks there for what the guide takes for both; the guide's own blind spots are its "
    "danger, which is why another network, of another architecture, judges. interpolated mixes two real images in "
    "latents whose mixtures a critic was trained to find nothing in; it is faithful to its two images, and as blurred "
    "as an autoencoder.",
    "H alone is easily fooled: pixel blends of a bird and a horse are a control for that. So an image has to be near "
    "the data too, by the features of a third network, and images are chosen without the judge.",
)


@dataclasses.dataclass(frozen=True)
class Route:
    """What one run made in one way."""

    name: str
    how: str
    candidates: Candidates
    scores: Scores


def write(
    runs: Sequence[tuple[RunFolder, Config | AutoencoderConfig]], options: Pegasus, say: Callable[[str], None]
) -> str:
    """Writes best.png, batch64.png, candidates.png, pegasus.json and index.html to options.out; returns a summary."""
    jury = Jury(options.guide, options.judge)
    out = options.out
    routes, controls, drawings = [], _controls(options), []
    for folder, config in runs:
        say(f"{folder.path.name}: {options.count} candidates of each route")
        if isinstance(config, AutoencoderConfig):
            trained = acai_experiment.open_run(config, folder)
            made = pegasus.interpolated(trained, options.count, options.seed)
            if not config.autoencoder.critic:
                controls["autoencoder_blends"] = made.pixels
                continue
            routes.append(("interpolated", f"ACAI, {folder.path.name}", made))
        else:
            routes += _of_generator(folder, config, options)
            drawings.append((folder, config))
    judged = []
    for name, how, made in routes:
        say(f"judging {name} ({how})")
        judged.append(Route(name, how, made, jury.scores(made.pixels)))
    if not judged:
        raise UserError("none of these runs is a route to a pegasus: give a generator of cifar10 or an ACAI run")
    numbers: dict[str, Any] = {}
    names = [r.name if [x.name for x in judged].count(r.name) == 1 else f"{r.name}-{i}" for i, r in enumerate(judged)]
    for name, route in zip(names, judged, strict=True):
        numbers |= {f"{name}.{k}": v for k, v in jury.numbers(route.candidates.pixels, route.scores).items()}
    for name, pixels in controls.items():
        numbers |= {f"{name}.{k}": v for k, v in jury.numbers(pixels, jury.scores(pixels)).items()}
    chosen = {name: jury.choose(r.scores, _BEST, options.most_distant) for name, r in zip(names, judged, strict=True)}
    tops = [r.scores.guided[chosen[name][0]] for name, r in zip(names, judged, strict=True)]
    winner = int(np.argmax(tops))
    best = _one(names[winner], judged[winner], int(chosen[names[winner]][0]))
    record = {
        "n": options.count,
        "seed": options.seed,
        "runs": [str(folder.path.name) for folder, _ in runs],
        "routes": {name: route.how for name, route in zip(names, judged, strict=True)},
        "best": best,
        "best_of_each_route": {n: _one(n, r, int(chosen[n][0])) for n, r in zip(names, judged, strict=True)},
        "numbers": numbers,
        "protocol": _protocol(options),
    }
    figures = _figures(out, names, judged, chosen, winner, controls, jury, drawings)
    write_json(out / "pegasus.json", record)
    tried = _log(out, record)
    _page(out, record, figures, tried)
    return summary(numbers, _MAIN) + f"\n\nbest: {_told(best)}\n{out / 'index.html'}"


def _of_generator(folder: RunFolder, config: Config, options: Pegasus) -> list[tuple[str, str, Candidates]]:
    if config.data.source != "cifar10":
        raise UserError(f"{folder.path} was trained on {config.data.source}, not on cifar10")
    labels = config.data.labels or tuple(range(10))
    if not {BIRD, HORSE} <= set(labels):
        raise UserError(f"{folder.path} knows no birds and horses: they are the classes {BIRD} and {HORSE} of cifar10")
    trained = experiment.open_run(config, folder)["best"]
    classes = (labels.index(BIRD), labels.index(HORSE)) if trained.model.classes else None
    name, count, seed = folder.path.name, options.count, options.seed
    found = [
        (
            "optimised",
            f"{name}, {options.steps} steps towards {options.guide}",
            pegasus.optimised(trained, classes, options.guide, count, seed, options.steps),
        )
    ]
    if classes is not None:
        found.insert(0, ("mixed", f"{name}, classes mixed", pegasus.mixed(trained, classes, count, seed)))
    return found


def _controls(options: Pegasus) -> dict[str, np.ndarray]:
    return {
        "real_birds": pegasus.real("test", BIRD),
        "real_horses": pegasus.real("test", HORSE),
        "pixel_blends": pegasus.blended(options.count, options.seed).pixels,
    }


def _one(name: str, route: Route, i: int) -> dict[str, Any]:
    s = route.scores
    return {
        "route": name,
        "index": i,
        "share_of_horse": float(route.candidates.shares[i]),
        "h": float(s.hybrid[i]),
        "bird": float(s.bird[i]),
        "horse": float(s.horse[i]),
        "h_guide": float(s.guided[i]),
        "distance": float(s.distance[i]),
    }


def _told(best: dict[str, Any]) -> str:
    return (
        f"{best['route']} number {best['index']}: H {best['h']:.2f} (bird {best['bird']:.2f}, horse "
        f"{best['horse']:.2f}; by the guide {best['h_guide']:.2f}), distance {best['distance']:.2f} times that of "
        "real images"
    )


def _figures(
    out: Path,
    names: Sequence[str],
    judged: Sequence[Route],
    chosen: dict[str, np.ndarray],
    winner: int,
    controls: dict[str, np.ndarray],
    jury: Jury,
    drawings: Sequence[tuple[RunFolder, Config]],
) -> list[tuple[Path, str]]:
    route = judged[winner]
    i = int(chosen[names[winner]][0])
    near = jury.train[route.scores.neighbour[i]]
    pair = _float(np.stack([route.candidates.pixels[i], near]))
    figures = [
        (
            images.write(out / "best.png", images.grid(pair[:1], least_height_px=256)),
            f"The chosen image of the route with the highest guide's H: {_told(_one(names[winner], route, i))}.",
        ),
        (
            images.write(out / "best_neighbour.png", images.grid(pair, least_height_px=256)),
            "It, and the training image nearest to it in feature space.",
        ),
        (
            images.write(out / "batch64.png", images.grid(_float(route.candidates.pixels[:_BATCH]), columns=16)),
            f"The first {_BATCH} candidates of that route ({names[winner]}), unselected.",
        ),
    ]
    sheet = np.concatenate([_float(r.candidates.pixels[chosen[n]]) for n, r in zip(names, judged, strict=True)])
    figures.append(
        (
            images.write(out / "candidates.png", images.grid(sheet, columns=_BEST)),
            f"The {_BEST} chosen images of each route, a row each: {', '.join(names)}.",
        )
    )
    for name, r in zip(names, judged, strict=True):
        if r is not route:
            path = images.write(
                out / f"batch64_{name}.png", images.grid(_float(r.candidates.pixels[:_BATCH]), columns=16)
            )
            figures.append((path, f"The first {_BATCH} candidates of the route {name}, unselected."))
    rows = np.concatenate([_float(pixels[:_BEST]) for pixels in controls.values()])
    path = images.write(out / "controls.png", images.grid(rows, columns=_BEST))
    figures.append((path, f"Controls, a row each: {', '.join(controls)}."))
    for folder, config in drawings:
        figures.append(_diagram(out, folder, config))
    return figures


def _diagram(out: Path, folder: RunFolder, config: Config) -> tuple[Path, str]:
    model = experiment.open_run(config, folder)["best"].model
    z, x = jnp.zeros((2, model.latent)), jnp.zeros((2, *model.shape))
    y = jnp.zeros((2, model.classes)) if model.classes else None
    columns = {
        "generator": diagram.parts(model.generator, z, y, True),
        "critic": diagram.parts(model.critic, x, y, True),
    }
    return diagram.draw(out / f"model_{folder.path.name}.png", columns), f"The networks of {folder.path.name}."


def _float(pixels: np.ndarray) -> np.ndarray:
    return np.float32(pixels) / 127.5 - 1


def _protocol(options: Pegasus) -> str:
    return PROTOCOL.format(
        judge=options.judge, guide=options.guide, count=options.count, seed=options.seed, distance=options.most_distant
    )


def _log(out: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Appends this attempt to the log of the folder; returns all of them."""
    path = out / _LOG
    tried = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    best = {key: record["best"][key] for key in ("route", "h", "h_guide", "distance")}
    before = max((row["h"] for row in tried), default=None)
    tried.append(
        {
            "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "runs": record["runs"],
            "n": record["n"],
            "seed": record["seed"],
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
    page.heading("Numbers")
    page.table(*metric_table(record["numbers"]))
    page.text(record["protocol"])
    page.heading("Routes")
    for name, how in record["routes"].items():
        page.text(f"{name}: {how}. Its chosen image: {_told(record['best_of_each_route'][name])}.")
    for path, caption in figures[4:]:
        page.figure(path, caption)
    page.heading("Discussion")
    for text in DISCUSSION:
        page.text(text)
    page.heading("What was tried")
    page.table(
        ["", "when", "runs", "N", "route", "H", "H by the guide", "distance", "change of the best H"],
        [
            [str(i + 1), row["utc"], ", ".join(row["runs"]), str(row["n"]), row["route"], number(row["h"]),
             number(row["h_guide"]), number(row["distance"]),
             "" if row["improved_h_by"] is None else f"{row['improved_h_by']:+.3f}"]
            for i, row in enumerate(tried)
        ],
    )  # fmt: skip
    page.code(json.dumps(record, indent=2), summary="all numbers")
    page.write(out / "index.html")
