"""Samplers as pairs of functions, and the one program that runs a pair as a whole chain.

    sampler = annealed_langevin(score_fn, sigmas, ...)     # ncsn.langevin, ncsn.ode, ncsn.underdamped
    sampler = inpaint(sampler, known, mask)                # ncsn.constraints wraps any of them
    draw = compile_sampler(lambda params, rows: ..., shape, mesh)
    samples, diagnostics = draw(params, key, count)

A sampler takes any score function `score_fn(x [b, ...], sigma [b] or [1]) -> [b, ...]`, the score of data convolved
with N(0, sigma^2 I), and its `x` is always data plus noise of a known sigma: processes that also shrink the data (VP,
sub-VP) are followed in the coordinates x / scale. Where all samples of a step have the same sigma it is given once,
as [1], so that what a network computes from it alone, often most of a small network's work, is computed once.

Sample i draws all its random numbers from `fold_in(key, i)` and computes in row i % width of a program whose shape is
always [width] on every device. So neither the number of samples asked for nor that of devices changes a bit of it: the
order of sums in a matrix product depends on the shape of the program, and only on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib.process import UserError
from lib.rows import Blocks, bar, on_mesh
from lib.shard import DATA, fetch, place
from ncsn.sde import Score

Start = Callable[[jax.Array, tuple[int, ...]], jax.Array]
"""(keys [b], shape) -> the first x [b, *shape] of a chain"""


class State(Protocol):
    """A NamedTuple of arrays that begin with the batch axis; `x` is what is being sampled."""

    @property
    def x(self) -> jax.Array: ...

    def _replace(self, **fields: Any) -> Any: ...


class Point(NamedTuple):
    """The state of a sampler without memory."""

    x: jax.Array  # [b, ...]


class Info(NamedTuple):
    """What one step tells, per sample: [b] each."""

    score_norm: jax.Array  # Euclidean norm of the score
    step_size: jax.Array  # factor of the score (Langevin, predictors) or decrease of sigma (solvers of the ODE)
    nfe: jax.Array  # int32, evaluations of the score function


class Sampler(NamedTuple):
    """`init(keys, shape)`, then `step(keys, i, state)` for i = 0, 1, ..., len(levels) - 2; keys [b], one per sample."""

    init: Callable[[jax.Array, tuple[int, ...]], Any]
    step: Callable[[jax.Array, jax.Array, Any], tuple[Any, Info]]
    levels: np.ndarray
    """float32 [steps + 1]: sigma of the noise in x before every step, and after the last one (0: none is left)"""


class Diagnostics(NamedTuple):
    """Of one call of the driver, as NumPy arrays."""

    score_norm: np.ndarray  # float64 [steps], mean over samples
    step_size: np.ndarray  # float64 [steps], mean over samples
    nfe: np.ndarray  # int [count]: evaluations that each sample needed
    frames: np.ndarray | None  # [count, frames, *shape]: x along the chain, the last frame being the sample
    noisy: np.ndarray | None  # [count, *shape]: x before the last step, which is the one that removes the noise


def normal(keys: jax.Array, shape: tuple[int, ...], *path: Any) -> jax.Array:
    """Standard normal [b, *shape]: row i from keys[i], folded along `path` (step number, purpose)."""
    return jax.vmap(lambda key: jax.random.normal(_folded(key, path), shape))(keys)


def _folded(key: jax.Array, path: tuple[Any, ...]) -> jax.Array:
    for number in path:
        key = jax.random.fold_in(key, number)
    return key


# The first number of a path below the key of a sample, so that no two purposes share random numbers.
START, VELOCITY, NOISE, CORRECTION, CONSTRAINT, BROWNIAN, PROBE = range(7)


def gaussian(std: float, mean: float = 0.0) -> Start:
    """Start from N(mean, std^2 I)."""
    return lambda keys, shape: mean + std * normal(keys, shape, START)


def uniform(low: float, high: float) -> Start:
    """Start from independent U[low, high) coordinates: (0, 1) in NCSN v1 and v2."""

    def start(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        draw = lambda key: jax.random.uniform(_folded(key, (START,)), shape, minval=low, maxval=high)  # noqa: E731
        return jax.vmap(draw)(keys)

    return start


def fixed(x: jax.Array) -> Start:
    """Start from given x [b, ...], as an interpolation of latents does."""
    return lambda keys, shape: x


def batch_norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm of every sample, [b, ...] -> [b]."""
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


class Linear(NamedTuple):
    """Steps x <- keep x + drift score(x, levels) + noise z: Langevin steps, predictors and Euler steps alike."""

    levels: np.ndarray  # [steps + 1]
    keep: np.ndarray  # [steps]
    drift: np.ndarray  # [steps]
    noise: np.ndarray  # [steps]


def linear_step(
    score_fn: Score, rule: Linear, keys: jax.Array, i: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Step i of `rule`: the next x, and the score at x."""
    levels, keep, drift, noise = (jnp.asarray(a, jnp.float32) for a in rule)
    score = score_fn(x, levels[i, None])
    x = keep[i] * x + drift[i] * score
    if np.any(rule.noise):
        x = x + noise[i] * normal(keys, x.shape[1:], NOISE, i)
    return x, score


def linear(score_fn: Score, rule: Linear, start: Start | None = None) -> Sampler:
    """The sampler that follows `rule`, from N(0, levels[0]^2 I) unless told otherwise."""
    begin = gaussian(float(rule.levels[0])) if start is None else start
    sizes = jnp.asarray(rule.drift, jnp.float32)

    def init(keys: jax.Array, shape: tuple[int, ...]) -> Point:
        return Point(begin(keys, shape))

    def step(keys: jax.Array, i: jax.Array, state: Point) -> tuple[Point, Info]:
        x, score = linear_step(score_fn, rule, keys, i, state.x)
        return Point(x), info(score, sizes[i], 1)

    return Sampler(init, step, np.asarray(rule.levels, np.float32))


def info(score: jax.Array, step_size: jax.Array, nfe: int | jax.Array) -> Info:
    """The Info of a step: score [b, ...], the others [b] or scalars."""
    b = score.shape[:1]
    return Info(batch_norm(score), jnp.broadcast_to(step_size, b), jnp.broadcast_to(jnp.int32(nfe), b))


def descending(levels: Any, *, to_zero: bool = True) -> np.ndarray:
    """Noise levels as float64 [n]. Raises UserError unless they descend from a positive one to 0 or above it."""
    array = np.asarray(levels, np.float64)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all() or (np.diff(array) >= 0).any():
        raise UserError(f"noise levels must be two or more falling numbers, not {_short(array)}")
    if array[-1] < 0 or (array[-1] == 0 and not to_zero):
        raise UserError(f"the last noise level is {array[-1]:g}: it must be {'0 or more' if to_zero else 'positive'}")
    return array


def _short(array: np.ndarray) -> str:
    return np.array2string(array, threshold=6, edgeitems=2, precision=4).replace("\n", "")


Build = Callable[[Any, Any], Sampler]
"""(params, rows) -> a sampler; `rows` are what belongs to single samples (labels, known pixels), [width, ...] each"""


class Draw(Protocol):
    def __call__(
        self, params: Any, key: jax.Array, count: int, rows: Any = (), *, first: int = 0, progress: str | None = None
    ) -> tuple[np.ndarray, Diagnostics]: ...


def compile_sampler(
    build: Build, shape: tuple[int, ...], mesh: Mesh, *, width: int | None = None, frames: int = 0, noisy: bool = False
) -> Draw:
    """Compiles `draw(params, key, count, rows) -> (samples [count, *shape], Diagnostics)`.

    The chain is a `lax.scan` over the steps of `build(params, rows)`, `width` samples per device side by side
    (default: `default_width`), in blocks until there are `count`. `rows` is a tree of arrays [count, ...]. Samples
    are those with the numbers first, first + 1, ...: asking for them in parts gives the same ones. Long chains are
    dispatched in equal pieces of one compiled program, between which the progress bar moves.

    `frames`: how many states along the chain to keep, evenly spaced; `noisy`: keep the one before the last step. Raises
    UserError where there are more frames than steps, and where arguments make no sense.
    """
    width = width or default_width(shape, mesh)
    if frames < 0 or width < 1:
        raise UserError(f"frames is {frames}, width is {width}: needed are frames >= 0 and width >= 1")

    def begin(params: Any, key: jax.Array, indices: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
        state = build(params, rows).init(keys, shape)
        return keys, (state, jnp.zeros((width, frames, *shape), state.x.dtype), state.x if noisy else ())

    def advance(carry: Any, params: Any, keys: jax.Array, rows: Any, numbers: jax.Array) -> tuple[Any, Info]:
        sampler = build(params, rows)
        steps = len(sampler.levels) - 1

        def one(carry: Any, i: jax.Array) -> tuple[Any, Info]:
            state, film, before = carry
            if noisy:
                before = jnp.where(i == steps - 1, state.x, before)
            state, told = sampler.step(keys, i, state)
            if frames:  # every step overwrites its frame, so the last step of each frame is what remains
                film = jax.lax.dynamic_update_index_in_dim(film, state.x, i * frames // steps, axis=1)
            return (state, film, before), told

        carry, told = jax.lax.scan(one, carry, numbers)
        return carry, jax.tree.map(lambda a: a.T, told)  # [width, steps]

    begin_all = on_mesh(begin, mesh, (P(), P(), P(DATA), P(DATA)))
    advance_all = on_mesh(advance, mesh, (P(DATA), P(), P(DATA), P(DATA), P()), donate=True)

    def draw(
        params: Any, key: jax.Array, count: int, rows: Any = (), *, first: int = 0, progress: str | None = None
    ) -> tuple[np.ndarray, Diagnostics]:
        blocks = Blocks(mesh, width, first, count, rows)
        params, key = place((params, key), mesh)
        steps = _count_steps(build, params, blocks)
        if frames > steps:
            raise UserError(f"{frames} frames of a chain of {steps} steps: ask for {steps} at most")
        pieces = [place(numbers, mesh) for numbers in np.split(np.arange(steps), _pieces(steps))]
        totals = np.zeros((2, steps))
        xs, films, befores, nfes = [], [], [], []
        with bar(progress, len(blocks) * steps) as shown:
            for indices, block_rows, wanted in blocks:
                keys, carry = begin_all(params, key, indices, block_rows)
                told = []
                for numbers in pieces:
                    carry, piece = advance_all(carry, params, keys, block_rows, numbers)
                    told.append(piece)
                    if not shown.disable:
                        jax.block_until_ready(piece.nfe)
                        shown.update(numbers.size)
                state, film, before = carry
                x, film, before, told = fetch((state.x, film, before, told))
                each = Info(*(np.concatenate(parts, axis=1)[wanted] for parts in zip(*told, strict=True)))
                xs.append(x[wanted])
                films.append(film[wanted])
                befores.append(before[wanted] if noisy else ())
                nfes.append(each.nfe.sum(axis=1))
                totals += [each.score_norm.sum(axis=0, dtype=np.float64), each.step_size.sum(axis=0, dtype=np.float64)]
        norm, size = totals / count
        film, before = (np.concatenate(parts) if kept else None for parts, kept in ((films, frames), (befores, noisy)))
        return np.concatenate(xs), Diagnostics(norm, size, np.concatenate(nfes), film, before)

    return draw


def default_width(shape: tuple[int, ...], mesh: Mesh) -> int:
    """Samples side by side on one device: a power of two that fills it, at most 1024 points or 128 images on a CPU."""
    cpu = mesh.devices.flat[0].platform == "cpu"
    numbers, most = (2**16, 10 if len(shape) == 1 else 7) if cpu else (2**20, 12)
    return 2 ** min(most, max(3, round(math.log2(numbers / math.prod(shape)))))


def _count_steps(build: Build, params: Any, blocks: Blocks) -> int:
    """How many steps the sampler has: read off while tracing, nothing is computed."""
    found = []

    def probe(params: Any, rows: Any) -> None:
        found.append(len(build(params, rows).levels) - 1)

    width = blocks.width
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((width, *a.shape[1:]), a.dtype), blocks.rows)
    jax.eval_shape(probe, params, rows)
    return found[0]


def _pieces(steps: int) -> int:
    """Into how many equal pieces a chain is cut: at most 20, of at least 32 steps; never a matter of who watches."""
    return max(n for n in range(1, 21) if steps % n == 0 and (n == 1 or steps // n >= 32))
