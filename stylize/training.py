"""Training of the feed-forward network: photographs in, the perceptual loss of what it makes of them out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lib import images
from lib.checkpoint import Checkpoints, check_finished, restore_finished
from lib.data import Beside, Resident
from lib.pixels import split_each
from lib.plan import Outline
from lib.process import UserError
from lib.run import RunFolder
from lib.shard import DATA, example_keys, fetch, make_mesh, make_state, most_devices, varying
from lib.train import Loss, Metrics, State, fit, init_state, make_step
from stylize import data, export, networks
from stylize.config import Config, Optim
from stylize.loss import Arrays, content_losses, content_of, gram, gram_distance, style_of, total_variation
from stylize.model import TransferNet
from stylize.vgg import LossNetwork

NAME = "transfer"
_STEPS_PER_CALL = 5
_LEAST_KEPT_PX = 512  # longest side of the style images that a run keeps, where it is trained with smaller ones
_MARGIN = 1.25  # squares of photographs are by default this much larger than the crops that are cut out of them
_BEYOND_WEIGHT = 10.0  # of the squares of what is beyond black and white
_IDENTITY_WEIGHT = 5.0  # of the squared error of pixels that are to stay as they are
_LONGEST_FILM = 12  # frames that a network with a memory makes, at most, before the one that it learns from
_CUTS = 0.1  # share of frames without one before
_FILMS = 2**32 - 1  # the key of their length: those of examples are folded from their indices


def build_model(config: Config) -> TransferNet:
    return TransferNet(config.network, len(config.styles) + 1)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Muon, with the size of Adam's updates, or Adam; the learning rate up over the warm-up, then down on a cosine.

    With `whole_lr`, that cosine ends with the crops, and whole squares have one of their own.
    """
    optim = config.optim
    first = optim.steps if optim.whole_lr is None else _crops(optim) or optim.steps
    warmup = min(round(optim.warmup * optim.steps), first - 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else optim.lr, optim.lr, warmup, first, optim.final_lr * optim.lr
    )
    if optim.whole_lr is not None and first < optim.steps:
        again = optax.cosine_decay_schedule(optim.whole_lr, optim.steps - first, optim.final_lr)
        rate = optax.join_schedules([rate, again], [first])
    if optim.algorithm == "adam":
        method = optax.adam(rate)
    else:
        method = optax.contrib.muon(
            rate, adam_learning_rate=rate, consistent_rms=0.2, muon_weight_dimension_numbers=_matrices
        )
    return optax.chain(optax.clip_by_global_norm(1.0), method)


def _matrices(params: Any) -> Any:
    """Kernels [h, w, c, features] of convolutions are matrices [h w c, features] to Muon."""
    kernel = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=(3,))
    return jax.tree.map(lambda p: kernel if p.ndim == 4 else None, params)


def start_state(config: Config) -> State:
    """The state before training."""
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    blank, mix = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, len(config.styles) + 1))
    params = jax.jit(build_model(config).init)(init_key, blank, mix)["params"]
    return init_state(params, optimizer(config), step_key)


def phases(config: Config) -> list[tuple[int, int]]:
    """(side of the squares that are seen, number of the last step of it), one after the other."""
    optim = config.optim
    crops = _crops(optim)
    found = [(optim.crop_px, crops), (photo_px(config), optim.steps)]
    return [(side, last) for (side, last), before in zip(found, (0, crops), strict=True) if last > before]


def _crops(optim: Optim) -> int:
    """The number of steps that see crops."""
    return optim.steps - round(optim.whole * optim.steps)


def photo_px(config: Config) -> int:
    """The side of the squares that photographs are made of."""
    return config.photo_px or round(_MARGIN * config.optim.crop_px)


def build_loss(config: Config, network: LossNetwork, side: int) -> Loss:
    """`loss(params, batch, key)` with batch {"image": uint8 [b, s, s, 3], "vgg": params, "grams": {layer: [styles,
    c, c]}}: crops [side, side] of the photographs in styles drawn at random, some of them in none.

    With a memory, what is learned from is the last of some frames of a camera that moves over the photograph.
    """
    model, optim, options = build_model(config), config.optim, config.perception
    styles, relative = len(config.styles), config.perception.scale == "relative"

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Metrics]:
        crop_keys, style_keys, plain_keys, film_keys = split_each(example_keys(key, batch["image"].shape[0]), 4)
        x = jax.vmap(functools.partial(data.crop, size=side))(batch["image"], crop_keys)
        chosen = jax.vmap(lambda k: jax.random.randint(k, (), 0, styles))(style_keys)
        plain = jax.vmap(lambda k: jax.random.bernoulli(k, optim.identity))(plain_keys).astype(jnp.float32)
        mix = jax.nn.one_hot(jnp.where(plain > 0, styles, chosen), styles + 1)

        clean, before = x, None
        if config.network.memory:
            fixed = {"params": jax.lax.stop_gradient(params)}
            frames = jax.random.randint(jax.random.fold_in(key, _FILMS), (), 1, _LONGEST_FILM + 1)
            clean, x, before = _film(lambda x, before: model.apply(fixed, x, mix, before), x, frames, film_keys)
        y = model.apply({"params": params}, x, mix, before)
        found = network.features(batch["vgg"], y, network.layers)
        wanted = content_of(network, batch["vgg"], clean)
        grams = {layer: gram(found[layer]) for layer in network.style_layers}
        style = jnp.stack(
            [gram_distance(g, batch["grams"][layer][chosen], relative=relative) for layer, g in grams.items()]
        ).mean(0)
        content = jnp.stack(list(content_losses(found, wanted, relative=relative).values())).mean(0)
        terms = {
            "style": jnp.mean((1 - plain) * style),
            "content": jnp.mean(content),
            "identity": jnp.mean(plain * jnp.mean((y - x) ** 2, (1, 2, 3))),
            "tv": total_variation(y),
            "beyond": jnp.mean((y - jnp.clip(y, -1, 1)) ** 2) * (config.network.output == "linear"),
        }
        total = (
            options.style_weight * terms["style"]
            + options.content_weight * terms["content"]
            + _IDENTITY_WEIGHT * terms["identity"]
            + options.tv_weight * terms["tv"]
            + _BEYOND_WEIGHT * terms["beyond"]
        )
        if before is not None:
            mask = before[..., 3:]
            terms["temporal"] = jnp.mean((mask * y - before[..., :3]) ** 2)
            total += optim.temporal_weight * terms["temporal"]
        return total, terms

    return loss


def _film(
    stylize: Callable[[jax.Array, jax.Array], jax.Array], photo: jax.Array, frames: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(last frame without noise, with noise, what `stylize` made of the one before, at its places) of a film.

    The camera moves over the photographs [b, s, s, 3], or in half of the films stands still, and `frames` come before
    the last: what a network makes of its own work time and again is to stay good. Every frame has noise of its own, as
    in compressed movies: without it, a network that does not look back would hardly flicker. The third result is
    [b, s, s, 4], multiplied by the mask that is its last channel.
    """
    size = photo.shape[1]
    film_keys, keys = split_each(keys, 2)
    speed = jax.vmap(jax.random.bernoulli)(film_keys).astype(jnp.float32)

    def frame(k: jax.Array, film: Any) -> Any:
        view, _, seen, before = film
        shown = jnp.clip(stylize(seen, before), -1, 1)  # as a movie's frames are

        def one(photo: jax.Array, speed: jax.Array, view: data.Camera, shown: jax.Array, key: jax.Array) -> Any:
            camera_key, hide_key, noise_key = jax.random.split(jax.random.fold_in(key, k), 3)
            camera = data.moving(camera_key, size, speed)
            view = camera.of(view)
            clean = data.seen_by(view, photo)[0]
            noisy = clean + data.film_noise(noise_key, size)
            return view, jnp.clip(clean, -1, 1), jnp.clip(noisy, -1, 1), _carried(camera, shown, hide_key)

        return jax.vmap(one)(photo, speed, view, shown, keys)

    view = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(photo), *x.shape)), data.still())
    blank = jnp.zeros((*photo.shape[:3], 4))
    _, clean, seen, before = jax.lax.fori_loop(0, frames, frame, varying((view, photo, photo, blank)))
    return clean, seen, before


def _carried(camera: data.Camera, shown: jax.Array, key: jax.Array) -> jax.Array:
    """[s, s, 4]: what was made of a frame [s, s, 3] at the places of the next one, masked, with the mask.

    Some of the time there is no frame before, as at a cut; otherwise a random box of it is hidden, as if covered.
    """
    size = len(shown)
    box_key, cut_key = jax.random.split(key)
    moved, inside = data.seen_by(camera, shown)
    low, high = jnp.sort(jax.random.uniform(box_key, (2, 2)), axis=0) * size
    hidden = jnp.all((data.grid(size) >= low) & (data.grid(size) < high), -1)
    mask = (inside * (1 - hidden) * jax.random.bernoulli(cut_key, 1 - _CUTS))[..., None]
    return jnp.concatenate([jnp.clip(moved, -1, 1) * mask, mask], -1)


def outline(config: Config, network: LossNetwork) -> Outline:
    """The training in shapes, of whole squares where there are any at the end."""
    side = phases(config)[-1][0]
    layers = {layer: network.channels(layer) for layer in network.style_layers}
    styles = max(len(config.styles), 1)
    config = dataclasses.replace(config, styles=config.styles or ("a style",))
    photos = jax.ShapeDtypeStruct((config.optim.batch_size, *2 * (photo_px(config),), 3), jnp.uint8)
    grams = {layer: jax.ShapeDtypeStruct((styles, c, c), jnp.float32) for layer, c in layers.items()}
    vgg = jax.eval_shape(lambda: network.params)
    step = make_step(build_loss(config, network, side), optimizer(config))
    state = jax.eval_shape(lambda: start_state(config))
    batch, specs = {"image": photos, "vgg": vgg, "grams": grams}, {"image": P(DATA), "vgg": P(), "grams": P()}
    return Outline(step, state, batch, specs)


def style_targets(config: Config, network: LossNetwork, params: Any) -> Arrays:
    """The Gram matrices of the style images, {layer: [styles, c, c]}."""
    styles = data.load_styles(config.styles, config.style_px)
    each = [style_of(network, params, [jnp.asarray(image)]) for image in styles]
    return {layer: jnp.stack([g[layer] for g in each]) for layer in network.style_layers}


def style_names(config: Config) -> list[str]:
    """The names of the style images without their endings; numbered where two are the same."""
    stems = [Path(path).stem for path in config.styles]
    counts = [stems[: k + 1].count(stem) for k, stem in enumerate(stems)]
    return [stem if n == 1 else f"{stem}-{n}" for stem, n in zip(stems, counts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A network that stylises."""

    config: Config
    params: Any

    @property
    def styles(self) -> list[str]:
        return style_names(self.config)


@dataclasses.dataclass(frozen=True)
class Materials:
    """What a network learns from."""

    photos: np.ndarray
    """uint8 [squares, s, s, 3]"""
    grams: Arrays
    """{layer: [styles, c, c]} of the styles"""
    params: Any
    """what the network begins with"""


def load_materials(config: Config, network: LossNetwork) -> Materials:
    """Raises UserError for unreadable images, no photographs, styles that are too small for the layers, and a run to
    begin with that is no finished one or of another network.
    """
    params = initial_params(config)
    grams = style_targets(config, network, network.params)
    return Materials(data.squares(images.files(Path(config.photos)), photo_px(config)), grams, params)


def initial_params(config: Config) -> Any:
    """The parameters of the run to begin with, in the shapes of this one's; drawn at random where there is none.

    Styles beyond those that it has begin like its last; what a memory brings to convolutions begins with zero.
    Raises UserError where the run is not finished, or its network another one.
    """
    if config.warm_start is None:
        return start_state(config).params
    folder, known = networks.opened(config.warm_start)
    if dataclasses.replace(known.network, memory=config.network.memory) != config.network:
        raise UserError(f"{config.warm_start} has another network: repeat its --network options")
    rows = [min(k, len(known.styles) - 1) for k in range(len(config.styles))] + [len(known.styles)]

    def fitted(wanted: jax.Array, found: np.ndarray) -> np.ndarray:
        if found.ndim == 2:  # scales or shifts of the styles, the last of which is none
            return found[np.array(rows)]
        sizes = list(zip(wanted.shape, found.shape, strict=True))
        found = found[tuple(slice(min(pair)) for pair in sizes)]
        return np.pad(found, [(0, max(new - old, 0)) for new, old in sizes])

    return jax.tree.map(fitted, start_state(config).params, open_run(known, folder).params)


def choose_mesh(config: Config, devices: int | None) -> Mesh:
    """`devices` of them; by default all, or on one host as many as the batch divides over.

    Raises UserError where there are not so many, and where the batch does not divide.
    """
    size = config.optim.batch_size
    mesh = make_mesh(most_devices(lambda count: size % count == 0) if devices is None else devices)
    if size % mesh.size:
        raise UserError(f"{size} photographs do not divide evenly over {mesh.size} devices: change optim.batch-size")
    return mesh


def train(
    config: Config,
    network: LossNetwork,
    materials: Materials,
    folder: RunFolder,
    mesh: Mesh,
    say: Callable[[str], None],
    *,
    sharded: bool = False,
) -> Trained:
    """Trains, or goes on. The batch is spread over the mesh, with `sharded` the state too."""
    photos, grams = materials.photos, materials.grams
    if folder.primary:
        # The run shows what it was trained for, wherever the images go, and what is exported of it is measured by them.
        kept_px = config.style_px and max(_LEAST_KEPT_PX, config.style_px)
        for name, image in zip(style_names(config), data.load_styles(config.styles, kept_px), strict=True):
            images.write(folder.path / "styles" / f"{name}.png", image)
    with Checkpoints(folder.checkpoints / NAME) as checkpoints:
        untrained = dataclasses.replace(start_state(config), params=materials.params)
        fresh = make_state(lambda: untrained, mesh, sharded=sharded)
        state = checkpoints.restore(fresh)
        done = 0 if state is None else int(state.step)
        if done < config.optim.steps:
            count = sum(x.size for x in jax.tree.leaves(fresh.params))
            begin = f", from step {done}" if done else ""
            say(f"training: {count:,} parameters, {len(photos)} squares of photographs, {len(config.styles)} "
                f"style{'s' if len(config.styles) > 1 else ''}, {config.optim.steps:,} steps{begin}")  # fmt: skip
        state = fresh if state is None else state
        source = Beside(
            Resident({"image": photos}, config.optim.batch_size, config.seed), {"vgg": network.params, "grams": grams}
        )
        for side, last in phases(config):
            state = fit(
                state,
                make_step(build_loss(config, network, side), optimizer(config)),
                source,
                steps=last,
                of=config.optim.steps,
                mesh=mesh,
                sharded=sharded,
                steps_per_call=_STEPS_PER_CALL,
                checkpoints=checkpoints,
                checkpoint_every=config.checkpoint_every,
                log=folder.logger(NAME, int(state.step)),
                progress=NAME,
            )
    return Trained(config, fetch(state.params))


def open_run(config: Config, folder: RunFolder) -> Trained:
    """A trained run, or what was exported of one. Raises UserError where its training is not finished, or damaged."""
    if (folder.path / export.WEIGHTS).exists():
        return Trained(config, export.read(folder.path, jax.eval_shape(lambda: start_state(config)).params))
    check_finished(folder.checkpoints / NAME, config.optim.steps)
    state = restore_finished(folder.checkpoints / NAME, functools.partial(start_state, config), config.optim.steps)
    return Trained(config, fetch(state.params))
