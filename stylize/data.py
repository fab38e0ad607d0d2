"""Photographs to learn from, style images, and a camera that moves over stills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lib import images
from lib.process import UserError

_LONGEST_SHAPE = 8  # sides of photographs: what is longer is left out


BUNDLED = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket")
"""photographs inside scikit-image, by name, for trying things out without any file"""


def read_image(path: Path) -> np.ndarray:
    """An image file, or one of `BUNDLED` where there is no such file: float32 [h, w, 3] in [-1, 1].

    Raises UserError as `lib.images.read` does.
    """
    if path.exists() or str(path) not in BUNDLED:
        return images.read(path)
    from skimage import data

    return images.from_uint8(getattr(data, str(path))())


def check_image(path: Path) -> None:
    """Raises UserError where `read_image` would before it reads the pixels: soon, also for many images."""
    if path.exists() or str(path) not in BUNDLED:
        with images.opened(path):
            pass


def squares(paths: Sequence[Path], side: int) -> np.ndarray:
    """Photographs as uint8 [n, side, side, 3]: each gives as many squares as cover it.

    The shorter side is resized to `side`; squares lie evenly along the longer one, of which at most eight are taken.
    Raises UserError for unreadable files.
    """
    out = []
    for path in paths:
        image = images.read(path)
        least = min(image.shape[:2])
        image = image[: _LONGEST_SHAPE * least, : _LONGEST_SHAPE * least]
        h, w = image.shape[:2]
        scale = side / min(h, w)
        image = images.resize(image, max(side, round(h * scale)), max(side, round(w * scale)))
        for top in _starts(image.shape[0], side):
            for left in _starts(image.shape[1], side):
                out.append(images.to_uint8(image[top : top + side, left : left + side]))
    return np.stack(out)


def _starts(length: int, side: int) -> np.ndarray:
    return np.linspace(0, length - side, -(-length // side)).round().astype(int)


def load_styles(paths: Sequence[str], longest_px: int | None) -> list[np.ndarray]:
    """Style images [h, w, 3], made smaller where they are larger. Raises UserError for none or unreadable ones."""
    if not paths:
        raise UserError("which style? give one image or more")
    out = []
    for path in paths:
        image = read_image(Path(path))
        longest = max(image.shape[:2])
        out.append(images.resize_longest(image, min(longest, longest_px or longest)))
    return out


def crop(image: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """A random square of uint8 [s, s, 3], mirrored half of the time: float32 [size, size, 3] in [-1, 1]."""
    top_key, left_key, flip_key = jax.random.split(key, 3)
    room = image.shape[0] - size + 1
    start = (jax.random.randint(top_key, (), 0, room), jax.random.randint(left_key, (), 0, room), 0)
    cut = jax.lax.dynamic_slice(image, start, (size, size, 3)).astype(jnp.float32) / 127.5 - 1
    return jnp.where(jax.random.bernoulli(flip_key), cut[:, ::-1], cut)


def camera(key: jax.Array, size: int) -> jax.Array:
    """Where each pixel of the next frame was in this one: [size, size, 2] rows and columns, in pixels.

    A shift of up to 8 % and a zoom of up to 5 % (fast-artistic-videos trains on such stills instead of videos), most of
    the time much less.
    """
    speed_key, shift_key, zoom_key = jax.random.split(key, 3)
    speed = jax.random.uniform(speed_key) ** 2
    shift = jax.random.uniform(shift_key, (2,), minval=-0.08, maxval=0.08) * size * speed
    zoom = 1 + jax.random.uniform(zoom_key, (), minval=-0.05, maxval=0.05) * speed
    centre = (size - 1) / 2
    return (grid(size) - centre) * zoom + centre + shift


def grid(size: int) -> jax.Array:
    """[size, size, 2]: row and column of every pixel."""
    return jnp.stack(jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"), -1).astype(jnp.float32)


def film_noise(key: jax.Array, size: int) -> jax.Array:
    """[size, size, 3]: half pixel by pixel, half in blocks of four as compression leaves it, of a random strength.

    A standard deviation of up to 0.05, 6 of 255 levels.
    """
    strength_key, fine_key, coarse_key = jax.random.split(key, 3)
    fine = jax.random.normal(fine_key, (size, size, 3))
    coarse = jax.random.normal(coarse_key, (-(-size // 4), -(-size // 4), 3))
    coarse = jnp.repeat(jnp.repeat(coarse, 4, 0), 4, 1)[:size, :size]
    return 0.05 * jax.random.uniform(strength_key) * (fine + coarse) / math.sqrt(2)


def warp(image: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(image [h, w, c] at the places [h', w', 2], bilinearly; [h', w'] 1 where these lie inside the image)."""
    h, w = image.shape[:2]
    inside = jnp.all((at >= 0) & (at <= jnp.array([h - 1, w - 1])), -1)
    low = jnp.clip(jnp.floor(at), 0, jnp.array([h - 2, w - 2])).astype(jnp.int32)
    part = jnp.clip(at - low, 0, 1)[..., None]
    i, j, down, right = low[..., 0], low[..., 1], part[..., 0, :], part[..., 1, :]
    top = image[i, j] * (1 - right) + image[i, j + 1] * right
    bottom = image[i + 1, j] * (1 - right) + image[i + 1, j + 1] * right
    return top * (1 - down) + bottom * down, inside.astype(image.dtype)
