"""The networks, all seen as one thing: a `ScoreModel`, pure functions that an experiment trains and follows.

    model = ncsn_v1((28, 28, 1), sigmas, ngf=64)       # or ncsn_v2(...), edm(UNet(...), ...), edm_energy(MLP(...), ...)
    params = model.init(key)                           # float32
    model.score(params, x, sigma, label, keys)         # grad log of (data * N(0, sigma^2 I)) at x
    model.denoise(params, x, sigma, label, keys)       # D = x + sigma^2 score = E[clean | x]
    model.network(params, x, sigma, label, keys)       # the last layer itself: what it is, each constructor says
    functools.partial(model.score, params)             # a score function (x, sigma) as samplers take it

x float32 [b, *shape] -> float32 [b, *shape]. sigma float32 [b], or [1] or [] for all (what depends on sigma alone is
then computed once), > 0, in the units of x. label int32 [b] or []: 0 .. classes - 1, and `classes` for "no class"; None
is "no class" for all. keys [b], one per example (`lib.shard.example_keys`), switch dropout on; without them it is off.
Row i of the output depends on row i of the inputs alone.

Losses: denoising score matching takes `score` for v1, and for v2 `network`, which is sigma score and whose target is
then -z; EDM takes `denoise`. Score and denoiser are each computed from the network without cancellation at any sigma.

`dtype=jnp.bfloat16` (a field of `UNet` and `MLP`) makes convolutions and matrix products bfloat16; parameters, norms,
the arithmetic of sigma, inputs and outputs stay float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lib.initial import initialised
from lib.process import UserError
from ncsn.blocks import MLP
from ncsn.noise import expand
from ncsn.refinenet import RefineNet
from ncsn.unet import UNet

Params = Any
Network = UNet | MLP
"""or another module with a field `classes` and `__call__(x, c_noise [b] or [1], label [b] | None, keys [b] | None)`"""


class Function(Protocol):
    """[b, *shape] -> [b, *shape]; the arguments are explained at the top of this file."""

    def __call__(
        self,
        params: Params,
        x: jax.Array,
        sigma: jax.Array | float,
        label: jax.Array | int | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class ScoreModel:
    """See the top of this file."""

    shape: tuple[int, ...]
    """of one example: (h, w, c) or (d,)"""
    init: Callable[[jax.Array], Params]
    network: Function
    score: Function
    denoise: Function
    energy: Function | None = None
    """-> [b]: the score is minus its gradient. It has a free constant for every sigma. None: there is no energy"""
    classes: int = 0
    """0: the network knows no classes, and a label raises ValueError"""
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    """of the images that it is made for"""


def ncsn_v1(
    shape: tuple[int, int, int], sigmas: Sequence[float] | np.ndarray, ngf: int = 128, dtype: Any = jnp.float32
) -> ScoreModel:
    """CondRefineNetDilated (Song and Ermon 2019, appendix A), whose norms know the level of the ladder `sigmas` [L].

    Pixels in [0, 1]. `network` is the score. A sigma between two levels is taken for the nearer one on a log scale.
    Raises UserError for images of odd size and for sigmas that are not positive.
    """
    _check_even(shape)
    ladder = np.asarray(sigmas, np.float64)
    if ladder.ndim != 1 or not len(ladder) or not (ladder > 0).all():
        raise UserError(f"the ladder of sigmas must be positive numbers, not {sigmas}")
    net = RefineNet(len(ladder), dtype, ngf)
    log_ladder = np.log(ladder).astype(np.float32)

    def score(params, x, sigma, label=None, keys=None):
        del keys
        _refuse(label)
        distance = jnp.abs(jnp.log(_as_vector(sigma))[:, None] - log_ladder)
        return net.apply(params, x, jnp.argmin(distance, axis=1))

    def denoise(params, x, sigma, label=None, keys=None):
        return x + _spread(sigma, x) ** 2 * score(params, x, sigma, label, keys)

    init = initialised(net, jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32))
    return ScoreModel(shape, init, score, score, denoise, pixel_range=(0.0, 1.0))


def ncsn_v2(shape: tuple[int, int, int], ngf: int = 128, dtype: Any = jnp.float32) -> ScoreModel:
    """The network of NCSNv2 (Song and Ermon 2020, technique 3): it does not see sigma, and is divided by it.

    Pixels in [0, 1]. `network` is sigma times the score. Raises UserError for images of odd size.
    """
    _check_even(shape)
    net = RefineNet(None, dtype, ngf)

    def network(params, x, sigma, label=None, keys=None):
        del sigma, keys
        _refuse(label)
        return net.apply(params, x)

    def score(params, x, sigma, label=None, keys=None):
        return network(params, x, sigma, label, keys) / _spread(sigma, x)

    def denoise(params, x, sigma, label=None, keys=None):
        return x + _spread(sigma, x) * network(params, x, sigma, label, keys)

    init = initialised(net, jnp.zeros((1, *shape)))
    return ScoreModel(shape, init, network, score, denoise, pixel_range=(0.0, 1.0))


def edm(net: Network, shape: tuple[int, ...], sigma_data: float = 0.5) -> ScoreModel:
    """F = net with the preconditioning of EDM: D(x) = c_skip x + c_out F(c_in x, c_noise) (Karras et al. 2022, eq. 7).

    `sigma_data` is the standard deviation of the data about zero, in the units of x. `network` is F.
    """

    def f(params, u, c_noise, label, keys):
        return net.apply(params, u, c_noise, label, keys)

    return _preconditioned(f, net, shape, sigma_data)


def edm_energy(net: Network, shape: tuple[int, ...], sigma_data: float = 0.5) -> ScoreModel:
    """`edm` with an F that is a gradient, F = -grad psi with psi(u) = -<u, net(u)>, hence with an energy:

        E(x) = |x|^2 / (2 (sigma^2 + sigma_data^2)) + sigma_data / sigma psi(c_in x),   score = -grad E.

    Up to a constant, every smooth function can be written as <u, net(u)>, so any `net` that `edm` takes will do. One
    score costs a forward and a backward pass, and training differentiates twice.
    """

    def psi(params, u, c_noise, label, keys):
        return -jnp.sum(u * net.apply(params, u, c_noise, label, keys), axis=tuple(range(1, u.ndim)))

    def f(params, u, c_noise, label, keys):
        return -jax.grad(lambda u: jnp.sum(psi(params, u, c_noise, label, keys)))(u)

    def energy(params, x, sigma, label=None, keys=None):
        s = _as_vector(sigma)
        c_in = jax.lax.rsqrt(s**2 + sigma_data**2)
        u = _spread(c_in, x) * x
        rest = psi(params, u, jnp.log(s) / 4, _labels(label, x, net.classes), keys)
        return jnp.sum(u**2, axis=tuple(range(1, u.ndim))) / 2 + sigma_data / s * rest

    return dataclasses.replace(_preconditioned(f, net, shape, sigma_data), energy=energy)


def _preconditioned(f: Callable[..., jax.Array], net: Network, shape: tuple[int, ...], sigma_data: float) -> ScoreModel:
    if not sigma_data > 0:
        raise UserError(f"sigma_data must be positive, not {sigma_data}")

    def network(params, x, sigma, label=None, keys=None):
        c_in = jax.lax.rsqrt(_spread(sigma, x) ** 2 + sigma_data**2)
        return f(params, c_in * x, jnp.log(_as_vector(sigma)) / 4, _labels(label, x, net.classes), keys)

    def score(params, x, sigma, label=None, keys=None):
        # (D - x) / sigma^2 with the division done by hand: the difference loses its digits where sigma is small.
        s = _spread(sigma, x)
        total = s**2 + sigma_data**2
        return sigma_data / s * jax.lax.rsqrt(total) * network(params, x, sigma, label, keys) - x / total

    def denoise(params, x, sigma, label=None, keys=None):
        s = _spread(sigma, x)
        total = s**2 + sigma_data**2
        c_skip, c_out = sigma_data**2 / total, s * sigma_data * jax.lax.rsqrt(total)
        return c_skip * x + c_out * network(params, x, sigma, label, keys)

    label = jnp.zeros(1, jnp.int32) if net.classes else None
    init = initialised(net, jnp.zeros((1, *shape)), jnp.zeros(1), label)
    return ScoreModel(shape, init, network, score, denoise, classes=net.classes)


def _as_vector(sigma: jax.Array | float) -> jax.Array:
    """[b] or [1]."""
    return jnp.atleast_1d(jnp.asarray(sigma, jnp.float32))


def _spread(sigma: jax.Array | float, x: jax.Array) -> jax.Array:
    """[b, 1, ...] or [1, 1, ...], to be multiplied with x."""
    return expand(_as_vector(sigma), x)


def _labels(label: jax.Array | int | None, x: jax.Array, classes: int) -> jax.Array | None:
    if not classes:
        return _refuse(label)
    return jnp.broadcast_to(jnp.asarray(classes if label is None else label, jnp.int32), x.shape[:1])


def _refuse(label: jax.Array | int | None) -> None:
    if label is not None:
        raise ValueError("a network without classes was given a label")


def _check_even(shape: tuple[int, int, int]) -> None:
    if len(shape) != 3 or shape[0] % 2 or shape[1] % 2:
        raise UserError(f"this network takes images [h, w, c] of even height and width, not {shape}")
