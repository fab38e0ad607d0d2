"""A pegasus: an image that is a bird and a horse, by three routes, judged by a classifier that guided none of them.

Routes, each from trained runs: `mixed`, a conditional generator whose class is a mixture of both; `optimised`, latents
and mixtures of a generator moved towards what the guiding classifier takes for both; `interpolated`, latents of a bird
and of a horse mixed by an autoencoder whose critic could not tell such mixtures from data.

Classifiers are one-vs-rest and calibrated, so that an image can be both. H = sqrt(p_bird p_horse) (geometric mean).
What is a copy, and what is no image of CIFAR-10, is measured in the features of a third network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.spatial.distance
from jax.scipy.special import logit

from gan.acai_experiment import Trained as Autoencoder
from gan.sampling import Trained, compile_generator, latents
from lib import features, images
from lib.data import load_labelled
from lib.features.classifier import load_predictor
from lib.judge import read
from lib.metrics import kernel
from lib.metrics.manifold import compare, nearest
from lib.shard import local_mesh

BIRD, HORSE = 2, 7  # of CIFAR-10
FEATURES = "cifar10_cnn"
NEIGHBOURS = 5
_MIXTURES = np.linspace(0.3, 0.7, 5)  # share of the horse
_SPREAD, _BATCH = 500, 256
_LR = 0.05
_PRIOR = 0.05  # of half the squared distance of a latent's mean square from 1, per dimension


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What a route made, unselected, in the order of its random numbers."""

    pixels: np.ndarray
    """uint8 [n, 32, 32, 3]"""
    shares: np.ndarray
    """[n]: the part that is horse"""


# ---- Routes


def mixed(trained: Trained, classes: tuple[int, int], count: int, seed: int) -> Candidates:
    """The class is a mixture: its embedding enters the generator's norms (or its inputs) as a weighted mean."""
    shares = _shares(count)
    made = compile_generator(trained.model, local_mesh(), min(500, count))(
        trained.variables, latents(trained.model, seed, count), _mixtures(trained, classes, shares)
    )
    return Candidates(images.to_uint8(made), shares)


def optimised(
    trained: Trained, classes: tuple[int, int] | None, guide: str, count: int, seed: int, steps: int
) -> Candidates:
    """Adam on latents, and on the mixture of classes where there are any, all steps in one program.

    What is maximised is the guide's log p_bird + log p_horse, the image shifted by up to a pixel in every step, less
    what keeps a latent about as long as N(0, 1) makes it.
    """
    predict, params = load_predictor(guide)
    shares = _shares(count)
    made = []
    run = jax.jit(_optimiser(trained, classes, predict, params, steps))
    z = latents(trained.model, seed, count)
    for first in range(0, count, _BATCH):
        rows = slice(first, min(first + _BATCH, count))
        x, share = run(z[rows], shares[rows], jax.random.fold_in(jax.random.key(seed), first))
        made.append((images.to_uint8(np.asarray(x)), np.asarray(share)))
    pixels, found = zip(*made, strict=True)
    return Candidates(np.concatenate(pixels), np.concatenate(found))


def _optimiser(
    trained: Trained, classes: tuple[int, int] | None, predict: Callable, params: Any, steps: int
) -> Callable[[Any, Any, Any], tuple[jax.Array, jax.Array]]:
    model, tx = trained.model, optax.adam(_LR)

    def generated(state: dict[str, jax.Array]) -> jax.Array:
        y = None
        if classes is not None:
            share = jax.nn.sigmoid(state["mixture"])[:, None]
            rows = jax.nn.one_hot(jnp.asarray(classes), model.classes)
            y = (1 - share) * rows[0] + share * rows[1]
        return model.generate(trained.variables, state["z"], y, train=False)[0]

    def loss(state: dict[str, jax.Array], shift: jax.Array) -> jax.Array:
        x = jnp.roll(jnp.pad(generated(state), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"), shift, (1, 2))
        chances = predict(params, x[:, 1:-1, 1:-1])[:, jnp.array([BIRD, HORSE])]
        long = jnp.mean(state["z"] ** 2, 1) - 1
        return jnp.sum(_PRIOR * model.latent / 2 * long**2 - jnp.log(chances + 1e-6).sum(1))

    def run(z: jax.Array, shares: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = {"z": z, "mixture": logit(jnp.asarray(shares))}

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            state, memory = carry
            grads = jax.grad(loss)(state, jax.random.randint(key, (2,), -1, 2))
            updates, memory = tx.update(grads, memory, state)
            return (optax.apply_updates(state, updates), memory), None

        (state, _), _ = jax.lax.scan(step, (state, tx.init(state)), jax.random.split(key, steps))
        return generated(state), jax.nn.sigmoid(state["mixture"])

    return run


def interpolated(trained: Autoencoder, count: int, seed: int) -> Candidates:
    """Latents of a test image of a bird and of one of a horse, mixed in straight lines."""
    rng = np.random.Generator(np.random.Philox(seed))
    ends = []
    for label in (BIRD, HORSE):
        rows = real("test", label)
        ends.append(trained.encode(rows[rng.integers(len(rows), size=count)]))
    shares = _shares(count)
    weight = shares[:, None, None, None]
    return Candidates(images.to_uint8(trained.decode((1 - weight) * ends[0] + weight * ends[1])), shares)


def blended(count: int, seed: int) -> Candidates:
    """A control: pixels of a bird and a horse, half of each."""
    rng = np.random.Generator(np.random.Philox(seed))
    pairs = [
        rows[rng.integers(len(rows), size=count)].astype(np.float32)
        for rows in (real("test", BIRD), real("test", HORSE))
    ]
    return Candidates(np.uint8(np.rint((pairs[0] + pairs[1]) / 2)), np.full(count, 0.5, np.float32))


def real(part: Literal["train", "test"], label: int) -> np.ndarray:
    """CIFAR-10's images of a class, uint8 [n, 32, 32, 3]."""
    rows = _cifar10(part)
    return rows["image"][rows["label"] == label]


@functools.cache  # decoded once
def _cifar10(part: Literal["train", "test"]) -> dict[str, np.ndarray]:
    return load_labelled("cifar10", part)


def _shares(count: int) -> np.ndarray:
    return np.resize(_MIXTURES, count).astype(np.float32)


def _mixtures(trained: Trained, classes: tuple[int, int], shares: np.ndarray) -> np.ndarray:
    rows = np.eye(trained.model.classes, dtype=np.float32)[list(classes)]
    return (1 - shares[:, None]) * rows[0] + shares[:, None] * rows[1]


# ---- Judgement


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every candidate, [n] each."""

    guided: np.ndarray
    """H of the guiding classifier, by which images are chosen"""
    hybrid: np.ndarray
    """H of the judging one"""
    bird: np.ndarray
    horse: np.ndarray
    """probabilities of the judging one"""
    distance: np.ndarray
    """to the nearest training images of birds and horses in feature space, over the median of real test images"""
    neighbour: np.ndarray
    """which training image is nearest"""
    features: np.ndarray
    """[n, d], of the third network"""


class Jury:
    """The guide, the judge, and the features that realism and uniqueness are measured in."""

    def __init__(self, guide: str, judge: str):
        self.guide, self.judge = features.load(guide), features.load(judge)
        self.net = features.load(FEATURES)
        self.train = np.concatenate([real("train", label) for label in (BIRD, HORSE)])
        self._train = read(self.net, self.train)[0]
        test = read(self.net, np.concatenate([real("test", label) for label in (BIRD, HORSE)]))[0]
        # What real images score.
        self._distance = float(np.median(nearest(self._train, test, NEIGHBOURS)[1].mean(1)))
        self._apart = _mean_distance(test[:: max(1, len(test) // _SPREAD)])
        self._kid = kernel.kid(self._train, test)[0]

    def scores(self, pixels: np.ndarray) -> Scores:
        found = read(self.net, pixels)[0]
        near, distances = nearest(self._train, found, NEIGHBOURS)
        guided = _both(self.guide, pixels)
        judged = _both(self.judge, pixels)
        return Scores(
            guided=np.sqrt(guided.prod(1)),
            hybrid=np.sqrt(judged.prod(1)),
            bird=judged[:, 0],
            horse=judged[:, 1],
            distance=distances.mean(1) / self._distance,
            neighbour=near[:, 0],
            features=found,
        )

    def numbers(self, scores: Scores) -> dict[str, float]:
        """Of a set, unselected."""
        kid, sd = kernel.kid(self._train, scores.features)
        verdicts = compare(self._train, scores.features)
        return {
            "h": float(scores.hybrid.mean()),
            "h_above_half": float(np.mean(scores.hybrid >= 0.5)),
            "h_most": float(scores.hybrid.max()),
            "h_guide": float(scores.guided.mean()),
            "bird": float(scores.bird.mean()),
            "horse": float(scores.horse.mean()),
            "kid": kid,
            "kid.sd": sd,
            "kid_of_real": self._kid,
            "precision": float(verdicts.precision.mean()),
            "distance": float(np.median(scores.distance)),
            "diversity": _mean_distance(scores.features[:_SPREAD]) / self._apart,
        }


def choose(scores: Scores, count: int, most_distant: float) -> np.ndarray:
    """The candidates that the guide takes for both the most, of those no farther from real images than asked."""
    order = np.argsort(-np.where(scores.distance <= most_distant, scores.guided, -1.0), kind="stable")
    return order[:count]


def _mean_distance(rows: np.ndarray) -> float:
    """Between two rows of [n, d]."""
    return float(scipy.spatial.distance.pdist(np.float64(rows)).mean())


def _both(net: Any, pixels: np.ndarray) -> np.ndarray:
    """[n, 2]: calibrated probabilities of bird and of horse, which need not sum to one."""
    logits = read(net, pixels)[1][:, [BIRD, HORSE]].astype(np.float64)
    return 1 / (1 + np.exp(-logits))
