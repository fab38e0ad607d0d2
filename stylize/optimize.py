"""Style transfer by optimisation of the pixels (Gatys et al., arXiv 1508.06576), from coarse to fine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib import images
from lib.checkpoint import Checkpoints
from lib.data import FullBatch
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import compile_step, fetch, place, spread_pixels
from lib.train import Loss, Metrics, State, Step, fit, init_state, make_step
from stylize import tiles
from stylize.config import Optimization, Perception, Scale
from stylize.loss import Arrays, content_of, everywhere, mixed, perceptual_loss, regions, style_of
from stylize.vgg import LossNetwork

_PREVIEW_EVERY = 50
# L-BFGS takes 5.5 GiB at 1024 x 768 pixels; in tiles, 4096 x 4096 pixels take less.
TILE_PX, _AT_ONCE_PX = 256, 3 * 2**18
_AT_ONCE_WITH_REGIONS_PX = 2**22  # which tiles cannot have


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be made, in pixels."""

    content: np.ndarray
    """[h, w, 3] in [-1, 1], of the size of the result"""
    styles: list[np.ndarray]
    """[h', w', 3] each, of any size; resized so that their longest side is `style_scale` times that of the result"""
    weights: list[float]
    """of the styles"""
    masks: np.ndarray | None = None
    """[styles, h, w] in [0, 1]: where each style goes; none: all of them everywhere, mixed"""
    style_scale: float = 1.0
    start: np.ndarray | None = None
    """[h, w, 3]: what to begin with, instead of what the options say"""


def scales(height: int, width: int, smallest_px: int) -> list[tuple[int, int]]:
    """Sizes from the first scale to the last, each half of the next one, none below `smallest_px` but the last."""
    sizes, longest = [(height, width)], max(height, width) / 2
    while longest >= smallest_px:
        sizes.append(images.fit_within(height, width, round(longest)))
        longest /= 2
    return sizes[::-1]


def schedule(options: Optimization, size: tuple[int, int], least_px: int) -> list[tuple[tuple[int, int], int]]:
    """(size, iterations) of each scale up to `size`; none is smaller than `least_px`, which the layers need."""
    sizes = [s for s in scales(*size, options.smallest_px) if min(s) >= least_px]
    return [(s, options.iterations[min(k, len(options.iterations) - 1)]) for k, s in enumerate(sizes)]


def tile_side(options: Optimization, size: tuple[int, int], *, regions: bool) -> int | None:
    """Of the tiles that a scale of this size is computed in; none where it is computed at once."""
    most_px = _AT_ONCE_WITH_REGIONS_PX if regions else _AT_ONCE_PX
    return options.tile_px or (TILE_PX if size[0] * size[1] > most_px else None)


def targets(network: LossNetwork, params: Any, task: Task, size: tuple[int, int], mesh: Mesh, *, tiled: bool) -> Any:
    """What the images of one scale are compared with: the batch of `objective`, or of `tiles.objective`.

    Raises UserError for regions in tiles.
    """
    if tiled and task.masks is not None:
        raise UserError("regions are not possible in tiles: choose a smaller --longest-px")
    content = images.resize(task.content, *size)
    longest = max(round(max(size) * task.style_scale), network.stride)
    styles = [_at_least(images.resize_longest(s, longest), network.stride) for s in task.styles]
    grams = [_grams_of(network, params, style, mesh) for style in styles]
    x = jnp.asarray(content)[None]
    if tiled:
        return {"params": params, "grams": mixed(grams, task.weights), "picture": x}
    if task.masks is None:
        style = everywhere(mixed(grams, task.weights))
    else:
        shapes = jax.eval_shape(lambda x: network.features(params, x, network.style_layers), x)
        masks = jnp.stack(
            [jnp.asarray(np.maximum(images.resize(mask[..., None], *size)[..., 0], 0)) for mask in task.masks]
        )
        style = regions(grams, masks, {layer: s.shape[1:3] for layer, s in shapes.items()})
    return {"params": params, "style": style, "content": content_of(network, params, x)}


def _grams_of(network: LossNetwork, params: Any, image: np.ndarray, mesh: Mesh) -> Arrays:
    """Those of a style image, in tiles where it is large."""
    x = jnp.asarray(image)
    if x.shape[0] * x.shape[1] <= _AT_ONCE_PX:
        return style_of(network, params, [x])
    return tiles.style_of(network, params, x, mesh, TILE_PX)


def _at_least(image: np.ndarray, least_px: int) -> np.ndarray:
    """Images that are too small for the deepest layer are enlarged, as a thin style image may be."""
    h, w = image.shape[:2]
    return images.resize(image, max(h, least_px), max(w, least_px))


def objective(network: LossNetwork, options: Perception, mesh: Mesh) -> Loss:
    """`loss(x, batch, key)` of pixels x [1, h, w, 3]; rows are spread over the mesh.

    `batch` is {"params", "style", "content"}: constants, but arguments of the program and no part of it. In a movie it
    also has "before" [1, h, w, 3], the stylised frame before at the places of this one, and "weight" [1, h, w, 1], how
    much each pixel is to resemble it: the temporal loss of Ruder et al. (arXiv 1604.08610, eq. 7), a mean of squares.
    """

    def loss(x: jax.Array, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        del key
        total, terms = perceptual_loss(
            network, options, batch["params"], spread_pixels(x, mesh), batch["style"], batch["content"]
        )
        if "before" not in batch:
            return total, terms
        temporal = jnp.mean(batch["weight"] * (x - batch["before"]) ** 2)
        return total + temporal, {**terms, "temporal": temporal}

    return loss


def transformation(options: Optimization, scale: Scale = "relative") -> optax.GradientTransformationExtraArgs:
    """The optimiser of pixels; its state does not depend on the scale of the losses."""
    if options.optimizer == "lbfgs" and options.tile_px is None:
        if not options.line_search:
            published = optax.scale(PUBLISHED_SCALE[scale])
            tx = optax.chain(published, _torch_lbfgs(options.memory), optax.scale(-1.0))
            return optax.with_extra_args_support(tx)
        return optax.lbfgs(memory_size=options.memory)
    # The second moment of pixels that hardly matter is tiny: a larger epsilon keeps them from drifting to grey.
    return optax.with_extra_args_support(optax.adam(options.lr, b1=0.9, b2=0.99, eps=1e-6))


PUBLISHED_SCALE: dict[Scale, float] = {"raw": images.GREY_LEVEL**2, "relative": 32_500 * images.GREY_LEVEL**2}
"""of the objective where pixels count up to 255 (32,500: a raw content loss over a relative one, photographs at
relu2_2). Without a line search the second step depends on it, if the gradient shrank along the first."""


class _Remembered(NamedTuple):
    lbfgs: Any
    step: jax.Array
    change: jax.Array
    """of the gradient along the step: the last pair that was remembered"""


def _torch_lbfgs(memory: int) -> optax.GradientTransformation:
    """L-BFGS of one array as torch.optim.LBFGS has it without a line search.

    The first step is one grey level in all pixels together, so little that rounding has a say in what comes next. Steps
    along which the gradient shrinks are not remembered. A line search makes no such steps. Without one they are
    made, and optax remembers them: its next step goes uphill. In the place of such a pair the last good one is
    remembered again, which changes nothing.
    """
    plain = optax.scale_by_lbfgs(memory_size=memory)

    def init(params: Any) -> _Remembered:
        return _Remembered(plain.init(params), jnp.zeros_like(params), jnp.zeros_like(params))

    def update(grads: Any, state: _Remembered, params: Any = None) -> tuple[Any, _Remembered]:
        step, change = params - state.lbfgs.params, grads - state.lbfgs.updates
        good = (state.lbfgs.count > 0) & (jnp.vdot(step, change) > 0)
        step, change = jnp.where(good, step, state.step), jnp.where(good, change, state.change)
        before = state.lbfgs._replace(params=params - step, updates=grads - change)
        updates, after = plain.update(grads, before, params)
        first = grads * (images.GREY_LEVEL / jnp.maximum(jnp.sum(jnp.abs(grads)), jnp.finfo(grads.dtype).tiny))
        return jnp.where(state.lbfgs.count > 0, updates, first), _Remembered(after, step, change)

    return optax.GradientTransformation(init, update)


def visible(loss: Loss) -> Loss:
    """`loss` of the pixels as a file shows them, between black and white, and a little for what is beyond.

    Without it the optimiser hides much of the style where nobody can see it: at 192 pixels the objective of the saved
    image is 1.0 after 60 iterations, with it 0.7. Johnson et al. (2016, section 4.1) clip after each iteration instead,
    which the line search does not see.
    """

    def clipped(x: jax.Array, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        shown = jnp.clip(x, -1, 1)
        total, terms = loss(shown, batch, key)
        return total + jnp.mean((x - shown) ** 2), terms

    return clipped


def lbfgs_step(loss: Loss, tx: optax.GradientTransformationExtraArgs) -> Step:
    """One iteration: a direction, and a line search that evaluates the objective until it has fallen enough.

    The metrics have the objective before the step and the number of its evaluations.
    """

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def value_fn(x: jax.Array) -> jax.Array:
            return loss(x, batch, key)[0]

        value, grads = optax.value_and_grad_from_state(value_fn)(state.params, state=state.opt_state)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=value, grad=grads, value_fn=value_fn)
        params = optax.apply_updates(state.params, updates)
        tries = optax.tree.get(opt_state, "num_linesearch_steps")
        metrics = {"loss": value, "evaluations": jnp.float32(tries)}
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return step


def adam_step(loss: Loss, tx: optax.GradientTransformationExtraArgs) -> Step:
    """One step of Adam on pixels, which stay in [-1, 1]."""
    plain = _counted(make_step(loss, tx))

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        state, metrics = plain(state, batch)
        return dataclasses.replace(state, params=jnp.clip(state.params, -1, 1)), metrics

    return step


def _counted(step: Step) -> Step:
    """`step`, and that it evaluates the objective once."""

    def counted(state: State, batch: Any) -> tuple[State, Metrics]:
        state, metrics = step(state, batch)
        return state, {**metrics, "evaluations": jnp.float32(1)}

    return counted


def build_step(network: LossNetwork, perception: Perception, options: Optimization, mesh: Mesh) -> Step:
    """One iteration of the optimiser that the options name; in tiles of Adam, which remembers less than L-BFGS."""
    tx = transformation(options, perception.scale)
    if options.tile_px is not None:
        return adam_step(tiles.objective(network, perception, mesh, options.tile_px), tx)
    loss = objective(network, perception, mesh)
    if options.optimizer == "adam":
        return adam_step(loss, tx)
    seen = visible(loss) if options.clip else loss
    return lbfgs_step(seen, tx) if options.line_search else _counted(make_step(seen, tx))


def optimize(
    network: LossNetwork,
    perception: Perception,
    options: Optimization,
    task: Task,
    folder: RunFolder,
    mesh: Mesh,
    *,
    seed: int,
    say: Callable[[str], None],
) -> np.ndarray:
    """The stylised image [h, w, 3] in [-1, 1], of the size of the content image.

    Every scale is a training of its own under RUN/checkpoints, so that a stopped run goes on where it was. Raises
    UserError for images that are too small for the deepest layer, Stopped after a signal.
    """
    h, w = task.content.shape[:2]
    if min(h, w) < network.stride:
        raise UserError(f"an image of {h} x {w} pixels is too small: {network.stride} are needed for these layers")
    params = place(network.params, mesh)
    x: np.ndarray | None = task.start
    for size, steps in schedule(options, (h, w), network.stride):
        here = dataclasses.replace(options, tile_px=tile_side(options, size, regions=task.masks is not None))
        batch = targets(network, params, task, size, mesh, tiled=here.tile_px is not None)
        if x is None:
            x = task.content if options.start == "content" else noise(seed, size)
        how = f"adam, in tiles of {here.tile_px} pixels" if here.tile_px else options.optimizer
        say(f"{size[1]} x {size[0]} pixels: {steps} iterations of {how}")
        name, start = f"{max(size)}px", images.resize(x, *size)
        x = _scale(network, perception, here, start, batch, folder, mesh, name, steps, seed)
    assert x is not None
    return x


def _scale(
    network: LossNetwork,
    perception: Perception,
    options: Optimization,
    start: np.ndarray,
    batch: Any,
    folder: RunFolder,
    mesh: Mesh,
    name: str,
    steps: int,
    seed: int,
) -> np.ndarray:
    """One scale, from `start` [h, w, 3] or its newest checkpoint."""

    def preview(state: State, done: int) -> None:
        if folder.primary:
            images.write(folder.path / "samples" / f"{name}_{done:04d}.png", fetch(state.params)[0])

    with Checkpoints(folder.checkpoints / name, keep=1) as checkpoints:

        def begin() -> State:
            fresh = place(init_state(jnp.asarray(start)[None], transformation(options), jax.random.key(seed)), mesh)
            restored = checkpoints.restore(fresh)
            return fresh if restored is None else restored

        # No name here for the state at the beginning: of a large image it takes a gigabyte for as long as it has one.
        state = fit(
            begin(),
            build_step(network, perception, options, mesh),
            FullBatch(batch, constant_spec=P()),
            steps=steps,
            mesh=mesh,
            how="jit",
            steps_per_call=1,
            checkpoints=checkpoints,
            checkpoint_every=_PREVIEW_EVERY,
            log=folder.logger(name, max(checkpoints.steps(), default=0)),
            hooks=[(_PREVIEW_EVERY, preview)],
            progress=name,
        )
    return np.clip(fetch(state.params)[0], -1, 1)


def noise(seed: int, size: tuple[int, int]) -> np.ndarray:
    """Independent grey levels, half as wide as the range."""
    return np.random.Generator(np.random.Philox(seed)).uniform(-0.5, 0.5, (*size, 3)).astype(np.float32)


def begin(x: np.ndarray, options: Optimization, mesh: Mesh) -> State:
    """Before the first iteration, from x [h, w, 3]. No two of its arrays share memory: all of it can be donated."""
    fresh = init_state(jnp.asarray(x)[None], transformation(options), jax.random.key(0))
    return place(jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), fresh), mesh)


def compile_iterations(
    network: LossNetwork, perception: Perception, options: Optimization, mesh: Mesh, count: int
) -> Callable[[State, Any], tuple[State, jax.Array]]:
    """`run(state, batch) -> (state, evaluations [count])`: so many iterations in one program, and nothing else.

    The state is what `begin` or an earlier run gave, which is donated; `batch` as in `objective`.
    """
    step = build_step(network, perception, options, mesh)

    def iterations(state: State, batch: Any) -> tuple[State, jax.Array]:
        def one(state: State, _: None) -> tuple[State, jax.Array]:
            state, metrics = step(state, batch)
            return state, metrics["evaluations"]

        return jax.lax.scan(one, state, None, length=count)

    return compile_step(iterations, mesh, "jit", in_specs=(P(), P()))


def compile_trace(
    network: LossNetwork, perception: Perception, options: Optimization, mesh: Mesh, iterations: int
) -> Callable[[np.ndarray, Any], tuple[jax.Array, jax.Array, jax.Array]]:
    """`run(x, batch) -> (image [1, h, w, 3], objective [iterations + 1], evaluations [iterations])` in one program.

    objective[n] is that of the image after n iterations between black and white, as a file shows it, though not rounded
    to 256 levels; where the optimiser does not see it so, that takes an evaluation more. `batch` as in `objective`.
    """
    step, tx = build_step(network, perception, options, mesh), transformation(options)
    loss = objective(network, perception, mesh)
    measured = visible(loss) if options.clip else lambda x, batch, key: loss(jnp.clip(x, -1, 1), batch, key)

    def chain(x: jax.Array, batch: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        def one(state: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array]]:
            after, metrics = step(state, batch)
            value = metrics["loss"] if options.clip else measured(state.params, batch, state.key)[0]
            return after, (value, metrics["evaluations"])

        state, (values, evaluations) = jax.lax.scan(one, init_state(x, tx, jax.random.key(0)), None, length=iterations)
        last = measured(state.params, batch, state.key)[0]
        return (), (state.params, jnp.append(values, last), evaluations)

    compiled = compile_step(lambda nothing, x, batch: chain(x, batch), mesh, "jit", in_specs=(P(), P(), P()))

    def run(x: np.ndarray, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        return compiled((), place(jnp.asarray(x)[None], mesh), batch)[1]

    return run
