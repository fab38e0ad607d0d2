"""python -m lib.features train: how the small classifiers' weights were made, and how to make them again.

A part of the training images is held out: recipes were chosen on it, and the temperature is fitted on it. The test
images are looked at once, by the finished weights as they are in the file.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh

from lib import config as configs
from lib import plot, shard
from lib.checkpoint import Checkpoints
from lib.data import Resident, load_labelled
from lib.features import classifier
from lib.features.augment import augment
from lib.features.calibration import fit_temperature, score
from lib.features.classifier import Design
from lib.features.net import outputs
from lib.features.recipes import PRESETS, Config
from lib.process import UserError
from lib.report import Page, text_table
from lib.run import RunFolder, read_json, write_bytes, write_evaluation, write_text
from lib.train import State, Step, fit, init_state

PACKAGE = "lib.features"
STEPS_PER_CALL = 20


@dataclass(frozen=True, kw_only=True)
class Train(configs.RunOptions):
    """Train a small classifier."""

    config: Annotated[Config, tyro.conf.arg(name="")]


def split_holdout(rows: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The images to learn from, and `count` held-out ones: a fixed random choice, the same for every seed."""
    if count >= len(rows["label"]):
        raise UserError(f"holdout is {count}, but there are only {len(rows['label'])} training images")
    order = np.random.Generator(np.random.Philox(1)).permutation(len(rows["label"]))
    return tuple({name: x[part] for name, x in rows.items()} for part in (order[count:], order[:count]))


def design_of(config: Config, image_shape: tuple[int, ...]) -> Design:
    """`image_shape`: [size, size, channels]. Photographs are centred; writing stands on a background of zeros."""
    zero = 0 if image_shape[-1] == 1 else 120
    return Design(config.kind, config.patch_px, config.widths, config.head, image_shape[0], image_shape[-1], zero)


def optimizer(config: Config) -> optax.GradientTransformation:
    rise = max(1, round(config.warmup * config.steps))
    up, down = (
        optax.linear_schedule(0.1 * config.lr, config.lr, rise),
        optax.linear_schedule(config.lr, 0.0, config.steps - rise),
    )
    schedule = optax.join_schedules([up, down], [rise])
    kernels = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    decay = optax.add_decayed_weights(config.weight_decay, mask=kernels)
    return optax.chain(decay, optax.sgd(schedule, momentum=0.9, nesterov=True))


# The least optimisation: a program that runs once, and takes five times as long to compile with more.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def _init(design: Design, key: jax.Array) -> Any:
    blank = jnp.zeros((1, design.size_px, design.size_px, design.channels))
    return classifier.build(design).init(key, blank, False)


def start_state(config: Config, design: Design, rows: dict[str, np.ndarray], tx: optax.GradientTransformation) -> State:
    """Before the first step. `extra` holds the statistics: batch norm's, and the whitening of the first layer."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    variables = _init(design, init_key)
    statistics = variables["statistics"]
    if config.kind == "plain":
        some = np.asarray(classifier.scaled(design, rows["image"][:2000]))
        statistics = {
            **statistics,
            "Whitening_0": {"kernel": jnp.asarray(classifier.whitening_kernel(some, config.patch_px))},
        }
    return dataclasses.replace(init_state(variables["params"], tx, step_key), extra=statistics)


def make_step(config: Config, design: Design, tx: optax.GradientTransformation) -> Step:
    """One update on a batch {"image": uint8 [b, h, w, c], "label": [b]}; the statistics travel in `state.extra`."""
    model = classifier.build(design)

    def step(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        keys = shard.example_keys(jax.random.fold_in(state.key, state.step), batch["label"].shape[0])
        changes = {"shift_px": config.shift_px, "flip": config.flip, "cutout_px": config.cutout_px}
        x = classifier.scaled(design, augment(batch["image"], keys, fill=design.zero, **changes))
        wanted = optax.smooth_labels(jax.nn.one_hot(batch["label"], design.classes), config.label_smoothing)

        def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            variables = {"params": params, "statistics": state.extra}
            out, changed = model.apply(variables, x, True, mutable=["statistics"])
            if config.head == "softmax":
                each = optax.softmax_cross_entropy(out.logits, wanted)
            else:
                each = jnp.sum(optax.sigmoid_binary_cross_entropy(out.logits, wanted), -1)
            return jnp.mean(each), (out.logits, changed["statistics"])

        (value, (logits, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(shard.varying(state.params))
        accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
        grads, metrics = shard.pmean((grads, {"loss": value, "accuracy": accuracy}))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state, extra=statistics)
        return new, metrics

    return step


def train(config: Config, rows: dict[str, np.ndarray], folder: RunFolder, mesh: Mesh) -> tuple[Design, Any]:
    """Trains, or goes on; returns the network's design and variables."""
    if config.batch_size > len(rows["label"]):
        raise UserError(f"batch_size is {config.batch_size}, but there are only {len(rows['label'])} images")
    design, tx = design_of(config, rows["image"].shape[1:]), optimizer(config)
    with Checkpoints(folder.checkpoints / config.name) as checkpoints:
        fresh = shard.place(start_state(config, design, rows, tx), mesh)
        state = checkpoints.restore(fresh)
        state = fit(
            fresh if state is None else state,
            make_step(config, design, tx),
            Resident(rows, config.batch_size, config.seed),
            steps=config.steps,
            mesh=mesh,
            steps_per_call=STEPS_PER_CALL,
            checkpoints=checkpoints,
            checkpoint_every=config.checkpoint_every,
            log=folder.logger(config.name, 0 if state is None else int(state.step)),
            progress=config.name,
        )
    return design, shard.fetch({"params": state.params, "statistics": state.extra})


def finish(
    config: Config, design: Design, variables: Any, heldout: dict[str, np.ndarray], folder: RunFolder
) -> dict[str, Any]:
    """Fits the temperature, writes NAME.safetensors and NAME.json, measures what was written. Returns the record."""
    path = folder.path / f"{config.name}.safetensors"
    write_bytes(path, classifier.serialize(design, variables))
    logits, _ = classifier_outputs(path, heldout["image"])
    temperature = fit_temperature(logits, heldout["label"], design.head)
    last = variables["params"]["Dense_0"]
    cooled = {name: x / np.float32(temperature) for name, x in last.items()}
    variables = {**variables, "params": {**variables["params"], "Dense_0": cooled}}
    write_bytes(path, classifier.serialize(design, variables))

    tested = load_labelled(config.data, "test")
    count = len(heldout["label"])
    logits, sha256 = classifier_outputs(path, np.concatenate([heldout["image"], tested["image"]]))
    validation = score(logits[:count], heldout["label"], design.head)
    test = score(logits[count:], tested["label"], design.head)
    rows = folder.metrics()
    record = {
        "name": config.name,
        "command": command_line(config),
        "data": {"cifar10": "CIFAR-10 (JPEG)", "mnist": "MNIST", "digits": "scikit-learn's digits"}[config.data],
        "test": dataclasses.asdict(test),
        "validation": dataclasses.asdict(validation),
        "temperature": round(temperature, 4),
        "parameters": sum(x.size for x in jax.tree.leaves(variables["params"])),
        "weights_sha256": sha256,
        "weights_bytes": path.stat().st_size,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "training_s": round(rows[-1]["wall_s"]),
        **{k: v for k, v in read_json(folder.path / "environment.json")[-1].items() if k in _RECORDED},
        "config": configs.to_json(config),
        "log": {key: [row[key] for row in rows] for key in rows[0]},
    }
    write_text(folder.path / f"{config.name}.json", _compact(record))
    return record


_RECORDED = ("git_commit", "python", "versions", "backend", "cores")


def _compact(record: dict[str, Any]) -> str:
    """JSON with one line per field: a log of hundreds of numbers stays one line."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()) + "\n}\n"


def classifier_outputs(path: Path, pixels: np.ndarray, batch_size: int = 500) -> tuple[np.ndarray, str]:
    """(logits float32 [n, classes], hash of the weights), the batch spread over this process's devices."""
    net = classifier.read(path)
    batches = (pixels[first : first + batch_size] for first in range(0, len(pixels), batch_size))
    found = outputs(net, batches, batch_size=batch_size, mesh=shard.local_mesh())
    return np.concatenate([logits for _, logits in found]), net.weights_sha256


def command_line(config: Config) -> str:
    """The shortest command that repeats a configuration."""
    by_name = {preset.name: key for key, preset in PRESETS.items()}
    key = by_name.get(config.name, config.data)
    return " ".join([f"python -m {PACKAGE} train {key}", *configs.options_of(config, PRESETS[key])])


def write_report(record: dict[str, Any], folder: RunFolder) -> None:
    """evaluation.json, the curves and report.html."""
    numbers = {f"{part}.{name}": record[part][name] for part in ("test", "validation") for name in record[part]}
    protocol = (
        f"{record['data']}: weights and temperature ({record['temperature']}) from training images alone, "
        "measured with the weights as they are in the file."
    )
    write_evaluation(folder.path, numbers, protocol)
    log, name = record["log"], record["name"]
    series = {"loss": (log["step"], log[f"{name}.loss"])}
    series["error rate"] = (log["step"], [1 - a for a in log[f"{name}.accuracy"]])
    curve = plot.curves(folder.figures / "training.png", series, x="step", y="on augmented training batches")
    page = Page(name, f"{record['data']}, {record['parameters']:,} parameters. {record['command']}")
    page.table(("number", "value"), [(key, f"{value:.5g}") for key, value in numbers.items()])
    page.text(protocol)
    page.figure(curve, "Loss and error rate while training, means over chunks of steps.")
    page.code(json.dumps(record["config"], indent=2), summary="configuration")
    page.write(folder.path / "report.html")


HELP = f"""usage: python -m {PACKAGE} train PRESET [--out RUN] [--resume] [--field value]

presets: {", ".join(PRESETS)}
`python -m {PACKAGE} train PRESET --help` lists every field; `train --config RUN/config.json --out NEW` repeats a run.
Writes RUN/NAME.safetensors and RUN/NAME.json; {PACKAGE}'s own are in {PACKAGE.replace(".", "/")}/pretrained."""


def main(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    base, where, rest = configs.starting_point(PRESETS, PACKAGE, args)
    chosen = configs.parse(Train(config=base), rest, f"python -m {PACKAGE} train PRESET")
    config = chosen.config
    out = chosen.out or where or Path("runs") / f"features-{config.name}"
    shard.start()
    mesh = shard.make_mesh(chosen.devices)
    rows, heldout = split_holdout(load_labelled(config.data, "train"), config.holdout)
    with RunFolder.start(
        out, PACKAGE, configs.to_json(config), resume=chosen.resume, primary=shard.primary()
    ) as folder:
        design, variables = train(config, rows, folder, mesh)
        if shard.primary():
            record = finish(config, design, variables, heldout, folder)
            write_report(record, folder)
            _say_result(record, folder)


def _say_result(record: dict[str, Any], folder: RunFolder) -> None:
    columns = ("", *record["test"])
    rows = [(part, *(f"{x:.5g}" for x in record[part].values())) for part in ("test", "validation")]
    print(f"\n{text_table(columns, rows)}\n\n{folder.path / record['name']}.safetensors\n{folder.path / 'report.html'}")
