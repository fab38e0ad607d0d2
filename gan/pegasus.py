"""A pegasus: an image that is a bird and a horse, by several routes, judged by a classifier that guided none of them.

Routes, each from trained runs: `mixed`, a conditional generator whose class is a mixture of both; `optimised`, latents
and mixtures of a generator moved towards what guiding classifiers take for both; `interpolated`, latents of a bird
and of a horse mixed by an autoencoder whose critic could not tell such mixtures from data; `moved`, these optimised.

The judge is one-vs-rest and calibrated, so that an image can be both. H = sqrt(p_bird p_horse) (geometric mean).
What is a copy, and what is no image of CIFAR-10, is measured in the features of a third network.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
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
from lib.features.augment import augment
from lib.features.classifier import load_predictor
from lib.features.net import FeatureNet
from lib.judge import read
from lib.metrics import kernel
from lib.metrics.manifold import compare, nearest
from lib.rows import compile_rows
from lib.shard import local_mesh

BIRD, HORSE = _BOTH = 2, 7  # of CIFAR-10
FEATURES = "cifar10_cnn"
NEIGHBOURS = 5
_MIXTURES = np.linspace(0.3, 0.7, 5)  # share of the horse
_SPREAD, _WIDTH = 500, 128  # _WIDTH: latents that a device moves at once
_LR = 0.05
_LEAST = 1e-6  # probability that a logarithm is taken of
_VIEWS = 4
_PRIOR, _NEAR = 0.05, 0.1  # weights of what keeps latents where a model knows them


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
    made = compile_generator(trained.model, local_mesh())(
        trained.variables, latents(trained.model, seed, count), _mixtures(trained, classes, shares)
    )
    return Candidates(images.to_uint8(made), shares)


def optimised(
    trained: Trained, classes: tuple[int, int] | None, guides: Sequence[str], count: int, seed: int, steps: int
) -> Candidates:
    """Latents of a generator that the guides take for both, kept about as long as N(0, 1) makes them.

    Of a conditional one also the mixtures of classes are found.
    """
    model = trained.model

    def generate(variables: Any, found: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> jax.Array:
        y = None
        if classes is not None:
            share = jax.nn.sigmoid(found["mixture"])[:, None]
            rows = jax.nn.one_hot(jnp.asarray(classes), model.classes)
            y = (1 - share) * rows[0] + share * rows[1]
        return model.generate(variables, found["z"], y, train=False)[0]

    def unlikely(found: dict[str, jax.Array]) -> jax.Array:
        return _PRIOR * model.latent / 2 * (jnp.mean(found["z"] ** 2, 1) - 1) ** 2

    start = {"z": latents(model, seed, count), "mixture": np.asarray(logit(_shares(count)))}
    made, found = _search(generate, unlikely, trained.variables, start, {}, guides, seed, steps)
    return Candidates(images.to_uint8(made), np.asarray(jax.nn.sigmoid(found["mixture"])))


def interpolated(trained: Autoencoder, count: int, seed: int) -> Candidates:
    """Latents of a test image of a bird and of one of a horse, mixed in straight lines."""
    z, shares = _between(trained, count, seed)
    return Candidates(images.to_uint8(trained.decode(z)), shares)


def moved(trained: Autoencoder, guides: Sequence[str], count: int, seed: int, steps: int) -> Candidates:
    """The latents of `interpolated` moved to what the guides take for both, kept near to where they were."""
    z, shares = _between(trained, count, seed)
    size, scale = z[0].size, float(z.std())

    def generate(params: Any, found: dict[str, jax.Array], fixed: dict[str, jax.Array]) -> jax.Array:
        return trained.model.decode(params, fixed["z"] + scale * found["way"])

    def unlikely(found: dict[str, jax.Array]) -> jax.Array:
        return _NEAR * size / 2 * jnp.mean(found["way"] ** 2, (1, 2, 3))

    made, _ = _search(generate, unlikely, trained.params, {"way": np.zeros_like(z)}, {"z": z}, guides, seed, steps)
    return Candidates(images.to_uint8(made.clip(-1, 1)), shares)


def _between(trained: Autoencoder, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(latents [count, w, w, channels], shares [count]) on straight lines from a bird to a horse, both test images."""
    ends = [trained.encode(drawn(label, count, seed)) for label in _BOTH]
    shares = _shares(count)
    weight = shares[:, None, None, None]
    return (1 - weight) * ends[0] + weight * ends[1], shares


def _search(
    generate: Callable[[Any, Any, Any], jax.Array],
    unlikely: Callable[[Any], jax.Array],
    variables: Any,
    start: dict[str, np.ndarray],
    fixed: dict[str, np.ndarray],
    guides: Sequence[str],
    seed: int,
    steps: int,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(images, found): Adam from `start` on, all steps in one program; rows are independent of each other.

    What is maximised is the guides' mean log p_bird + log p_horse of generate(variables, found, fixed), each image
    shifted and mirrored anew in every step, less unlikely(found) [n].
    """
    predictors, params = zip(*(load_predictor(name) for name in guides), strict=True)
    tx = optax.adam(_LR)

    def loss(found: Any, fixed: Any, variables: Any, params: Any, keys: jax.Array) -> jax.Array:
        x = _view(generate(variables, found, fixed), keys)
        both = [predict(p, x)[:, jnp.array(_BOTH)] for predict, p in zip(predictors, params, strict=True)]
        return jnp.sum(unlikely(found) - jnp.log(jnp.stack(both) + _LEAST).sum(2).mean(0))

    def block(shared: Any, numbers: jax.Array, rows: dict[str, Any]) -> tuple[jax.Array, Any]:
        variables, params, key = shared
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

        def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
            found, memory = carry
            now = jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)
            updates, memory = tx.update(jax.grad(loss)(found, rows["fixed"], variables, params, now), memory, found)
            return (optax.apply_updates(found, updates), memory), None

        first = (rows["start"], tx.init(rows["start"]))
        (found, _), _ = jax.lax.scan(step, first, jnp.arange(steps))
        return generate(variables, found, rows["fixed"]), found

    run = compile_rows(block, local_mesh(), _WIDTH)
    return run((variables, params, jax.random.key(seed)), {"start": start, "fixed": fixed})


def _view(pixels: jax.Array, keys: jax.Array) -> jax.Array:
    """[n, h, w, c] as the classifiers saw images in their training, [n] keys: a little shifted, maybe mirrored."""
    return augment(pixels, keys, shift_px=2, flip=True, cutout_px=0, fill=0)


def blended(count: int, seed: int) -> Candidates:
    """A control: pixels of a bird and a horse, half of each."""
    birds, horses = (drawn(label, count, seed).astype(np.float32) for label in _BOTH)
    return Candidates(np.uint8(np.rint((birds + horses) / 2)), np.full(count, 0.5, np.float32))


def drawn(label: int, count: int, seed: int) -> np.ndarray:
    """Random test images of a class, uint8 [count, 32, 32, 3]; image i depends on the seed and on i alone."""
    rows = real("test", label)
    return rows[np.random.Generator(np.random.Philox(key=[seed, label])).integers(len(rows), size=count)]


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
    """H of the guiding classifiers, by which images are chosen: the geometric mean over them and views of the image.
    One of them may have a softmax, whose H is 0.5 at most (`cifar10_vgg`)"""
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
    """The guides, the judge, and the features that realism and uniqueness are measured in."""

    def __init__(self, guides: Sequence[str], judge: str):
        self.guides, self.judge = [features.load(name) for name in guides], features.load(judge)
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
        keys = [jnp.repeat(jax.random.key(i)[None], len(pixels)) for i in range(_VIEWS)]
        views = [np.asarray(_view(jnp.asarray(pixels), key)) for key in keys]
        guided = [np.log(_both(guide, view) + _LEAST).mean(1) for guide in self.guides for view in views]
        judged = _both(self.judge, pixels)
        return Scores(
            guided=np.exp(np.mean(guided, axis=0)),
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
    """The candidates that the guides take for both the most, of those no farther from real images than asked: at most
    `count`, none where all are farther."""
    order = np.argsort(-scores.guided, kind="stable")
    return order[scores.distance[order] <= most_distant][:count]


def _mean_distance(rows: np.ndarray) -> float:
    """Between two rows of [n, d]."""
    return float(scipy.spatial.distance.pdist(np.float64(rows)).mean())


def _both(net: FeatureNet, pixels: np.ndarray) -> np.ndarray:
    """[n, 2]: calibrated probabilities of bird and of horse."""
    return np.asarray(net.probabilities(jnp.asarray(read(net, pixels)[1])), np.float64)[:, _BOTH]
