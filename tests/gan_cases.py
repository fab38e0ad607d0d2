"""What several tests of GANs share: configurations that compile in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from gan.config import PRESETS, Config, Data, Evaluation, Network, Optim, Watch
from gan.data import Facts

POINTS = Config(
    data=Data("gaussians"),
    network=Network("mlp", latent=2, width=8, critic_width=8, levels=1, critic_norm="spectral"),
    optim=Optim("hinge", steps=12, n_critic=2, batch_size=8, generator_batch=16, lr=1e-2, b1=0.0, decay="linear",
                gradient_penalty=0.1),
    watch=Watch(every=4, samples=40),
    evaluation=Evaluation(200),
    checkpoint_every=4,
)  # fmt: skip
POINT_FACTS = Facts((2,), 64, 0)
DIGITS = replace(
    PRESETS["digits_dcgan"],
    network=Network(latent=3, width=2, critic_width=2, levels=2, conditioning="concatenation"),
    optim=Optim(steps=4, batch_size=8, lr=1e-3, decay="linear"),
    watch=Watch(every=2, samples=24),
    evaluation=Evaluation(24),
    checkpoint_every=2,
)
DIGIT_FACTS = Facts((8, 8, 1), 1437, 10)


def points(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).normal(size=(count, 2)).astype(np.float32)}


def digits(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "image": rng.integers(0, 256, (count, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, count).astype(np.int32),
    }


def numbers_of(folder):
    """The evaluation of a run."""
    return json.loads((Path(folder) / "evaluation.json").read_text())


def rows_of(folder):
    """What a run has logged, without the times."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall_s"} for row in rows]


def by_step(rows):
    """In an order that an interruption does not change."""
    return sorted(rows, key=lambda row: (row["step"], sorted(row)))


def refused(code, err, message):
    """One line on stderr, with the message in it, and the exit code of a user's mistake."""
    assert code == 2, err
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and message in err, err
