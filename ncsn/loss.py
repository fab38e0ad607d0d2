"""What score networks are trained on. Every loss is `loss(params, batch, key) -> (scalar, {name: scalar})`, pure.

A batch is {"image": uint8 [b, h, w, c], "label": int [b]} or {"x": float [b, d]}. With x~ = x + sigma z, the losses of
NCSN, NCSNv2, EDM and the diffusions are all means of w(sigma) |sigma score(x~, sigma) + z|^2 over z and sigma; they
differ in what the network gives (score, sigma score, denoised x), in how sigma is drawn (`uniform_level`, `log_normal`,
`sde.uniform_time`) and in w. Squares are summed over the dimensions of an example, as in the papers, and averaged over
the batch. The metric `noise_error` is the mean over both with w = 1: a network that is silent has 1.

Every random number of an example comes from its own key (`lib.shard.example_keys`), so the number of devices changes
none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lib.pixels import Pixels, split_each
from lib.process import UserError
from lib.shard import example_keys
from lib.train import Loss
from ncsn.noise import Draw, expand

ScoreFn = Callable[[Any, jax.Array, jax.Array], jax.Array]  # (params, x [b, ...], sigma [b]) -> [b, ...]
Weight = Callable[[jax.Array], jax.Array]  # sigma [b] -> [b]


def dropped(label: jax.Array, keys: jax.Array, probability: float, classes: int) -> jax.Array:
    """Labels [b], each replaced by `classes` ("no class") with this probability, for classifier-free guidance."""
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
    return jnp.where(drop, classes, label)


def denoising(score_fn: ScoreFn, draw: Draw, weight: Weight | None = None, pixels: Pixels = Pixels()) -> Loss:
    """Denoising score matching, 1/2 |score + (x~ - x) / sigma^2|^2 sigma^2 w(sigma), w = 1 unless given.

    NCSN v1 (arXiv 1907.05600 eq. 6, lambda = sigma^2): draw = uniform_level(sigmas). The diffusions of arXiv
    2011.13456 (eq. 7): draw = uniform_time(process), and weight = likelihood_weight(process) for the likelihood's
    bound; in their own coordinates the loss is the same number.
    """

    def net(params, x, sigma):
        return expand(sigma, x) * score_fn(params, x, sigma)

    return noise_prediction(net, draw, weight, pixels)


def noise_prediction(net: ScoreFn, draw: Draw, weight: Weight | None = None, pixels: Pixels = Pixels()) -> Loss:
    """1/2 |net(x~, sigma) + z|^2 w(sigma) for a net that is sigma * score (NCSNv2, technique 3), w = 1 unless given."""

    def loss(params, batch, key):
        drawn = _draw(batch, key, draw, pixels)
        squares = _squares(net(params, drawn.noisy, drawn.sigma).astype(jnp.float32) + drawn.z)
        weights = jnp.ones_like(drawn.sigma) if weight is None else weight(drawn.sigma)
        return jnp.mean(weights * squares) / 2, {"noise_error": jnp.mean(squares) / drawn.dimension}

    return loss


def edm_weight(sigma_data: float) -> Weight:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, table 1): every sigma's first loss is 1 per dimension."""
    return lambda sigma: 1 / sigma_data**2 + 1 / sigma**2


def edm(
    denoise_fn: Callable[..., jax.Array],
    draw: Draw,
    weight: Weight,
    pixels: Pixels = Pixels(),
    *,
    classes: int = 0,
    label_dropout: float = 0.0,
) -> Loss:
    """w(sigma) |D(x~, sigma, label) - x|^2 (EDM eq. 8) for D = `denoise_fn(params, x, sigma, label, keys)`.

    EDM has draw = log_normal(P_mean, P_std) and weight = edm_weight(sigma_data). The loss of a diffusion has
    draw = uniform_time(process) and weight 1 / (2 sigma^2). `keys` [b] are for the network's own dropout. `label` is
    None unless there are `classes`; it is then `batch["label"]`, replaced by `classes` with probability
    `label_dropout`. UserError where labels are wanting.
    """
    if not 0 <= label_dropout <= 1:
        raise UserError(f"label_dropout is {label_dropout:g}: it must be between 0 and 1, a probability")
    if label_dropout and not classes:
        raise UserError(f"label_dropout is {label_dropout:g}, but the network knows no classes: set it to 0")

    def loss(params, batch, key):
        drawn = _draw(batch, key, draw, pixels)
        label = None
        if classes:
            if "label" not in batch:
                raise UserError(f"the network knows {classes} classes, but the data have no labels: train it without")
            label = dropped(batch["label"], drawn.label_keys, label_dropout, classes)
        denoised = denoise_fn(params, drawn.noisy, drawn.sigma, label, drawn.net_keys)
        squares = _squares(denoised.astype(jnp.float32) - drawn.x)
        noise_error = jnp.mean(squares / drawn.sigma**2) / drawn.dimension
        return jnp.mean(weight(drawn.sigma) * squares), {"noise_error": noise_error}

    return loss


def sliced(
    score_fn: Callable[[Any, jax.Array], jax.Array],
    pixels: Pixels = Pixels(),
    *,
    directions: Callable[..., jax.Array] = jax.random.rademacher,
    projections: int = 1,
) -> Loss:
    """Sliced score matching with variance reduction, 1/2 |s|^2 + v' grad(v' s), of the data as they are.

    arXiv 1905.07088, eq. 8. `score_fn(params, x)`; v is drawn `projections` times by `directions`
    (`jax.random.rademacher` or `jax.random.normal`). The network must treat examples independently.
    """

    def loss(params, batch, key):
        drawn = _draw(batch, key, lambda key: jnp.zeros(()), pixels)
        norms, traces = _sliced(lambda x: score_fn(params, x), drawn.x, drawn.direction_keys, directions, projections)
        return jnp.mean(norms + traces), {"norm": jnp.mean(norms), "trace": jnp.mean(traces)}

    return loss


def sliced_noisy(
    score_fn: ScoreFn,
    draw: Draw,
    pixels: Pixels = Pixels(),
    *,
    directions: Callable[..., jax.Array] = jax.random.rademacher,
    projections: int = 1,
) -> Loss:
    """`sliced` at noise levels, times sigma^2 (NCSN v1, section 4.2): `score_fn(params, x~, sigma)`.

    Its minimiser is that of `denoising`; the values differ by a constant.
    """

    def loss(params, batch, key):
        drawn = _draw(batch, key, draw, pixels)
        score = lambda x: score_fn(params, x, drawn.sigma)  # noqa: E731
        norms, traces = _sliced(score, drawn.noisy, drawn.direction_keys, directions, projections)
        norms, traces = norms * drawn.sigma**2, traces * drawn.sigma**2
        return jnp.mean(norms + traces), {"norm": jnp.mean(norms), "trace": jnp.mean(traces)}

    return loss


class _Drawn(NamedTuple):
    x: jax.Array  # [b, ...] clean
    sigma: jax.Array  # [b]
    z: jax.Array  # [b, ...] standard normal
    label_keys: jax.Array  # [b], like the others
    net_keys: jax.Array
    direction_keys: jax.Array

    @property
    def noisy(self) -> jax.Array:
        return self.x + expand(self.sigma, self.x) * self.z

    @property
    def dimension(self) -> int:
        return math.prod(self.x.shape[1:])


def _draw(batch: Any, key: jax.Array, draw: Draw, pixels: Pixels) -> _Drawn:
    """Everything random about the examples of a batch; what a loss does not use, XLA removes."""
    raw = batch["image"] if "image" in batch else batch["x"]
    pixel_keys, level_keys, noise_keys, *others = split_each(example_keys(key, len(raw)), 6)
    x = pixels(raw, pixel_keys) if "image" in batch else raw
    z = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(noise_keys)
    return _Drawn(x, jax.vmap(draw)(level_keys), z, *others)


def _squares(error: jax.Array) -> jax.Array:
    return jnp.sum(error**2, axis=tuple(range(1, error.ndim)))


def _sliced(
    score: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    keys: jax.Array,
    directions: Callable[..., jax.Array],
    projections: int,
) -> tuple[jax.Array, jax.Array]:
    """1/2 |s|^2 and the mean of v' (ds/dx) v over the directions, both [b]."""
    # One forward pass for both. In reverse, because `lib.conv` has no forward mode on the CPU.
    s, pull_back = jax.vjp(score, x)
    traces = []
    for each in split_each(keys, projections):
        v = jax.vmap(lambda key: directions(key, x.shape[1:], s.dtype))(each)
        traces.append(jnp.sum(v * pull_back(v)[0], axis=tuple(range(1, x.ndim)), dtype=jnp.float32))
    return _squares(s.astype(jnp.float32)) / 2, sum(traces) / projections
