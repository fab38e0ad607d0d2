"""Photographs to learn from, style images, and a camera that moves over stills."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lib import images
from lib.process import UserError

_BEND = -0.75  # the free parameter of cubic convolution, as OpenCV has it
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


def size_of(path: Path) -> tuple[int, int]:
    """(h, w) of an image as it is stored, perhaps turned.

    Raises UserError where `read_image` would before it reads the pixels: soon, also for many images.
    """
    if not path.exists() and str(path) in BUNDLED:
        h, w, _ = read_image(path).shape
        return h, w
    with images.opened(path) as image:
        return image.height, image.width


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


class Camera(NamedTuple):
    """Row or column i of what it sees is at zoom i + shift of the image, in pixels."""

    zoom: jax.Array  # []
    shift: jax.Array  # [2], of rows and of columns

    def of(self, first: Camera) -> Camera:
        """What it sees of what another one sees, as one camera."""
        return Camera(first.zoom * self.zoom, first.zoom * self.shift + first.shift)


def still() -> Camera:
    """Sees an image as it is."""
    return Camera(jnp.ones(()), jnp.zeros(2))


def moving(key: jax.Array, size: int, speed: jax.Array | float = 1.0) -> Camera:
    """What the next frame of a film [size, size] sees of this one.

    A shift of up to 8 % and a zoom of up to 5 % (fast-artistic-videos trains on such stills instead of videos), most of
    the time much less; all of it times `speed`.
    """
    speed_key, shift_key, zoom_key = jax.random.split(key, 3)
    speed *= jax.random.uniform(speed_key) ** 2
    shift = jax.random.uniform(shift_key, (2,), minval=-0.08, maxval=0.08) * size * speed
    zoom = 1 + jax.random.uniform(zoom_key, (), minval=-0.05, maxval=0.05) * speed
    centre = (size - 1) / 2
    return Camera(zoom, centre * (1 - zoom) + shift)


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


def seen_by(camera: Camera, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(the image [h, w, c] as the camera sees it, of the same size; [h, w] 1 where that lies inside the image).

    Bicubic, as `stylize.flow.carry` brings a frame to the next one's places; the border goes on beyond it.
    """
    at = [camera.zoom * jnp.arange(n) + shift for n, shift in zip(image.shape[:2], camera.shift, strict=True)]
    rows, columns = (_cubic(where, n) for where, n in zip(at, image.shape[:2], strict=True))
    seen = jnp.einsum("ri,sj,ijc->rsc", rows, columns, image, precision="highest")
    inside = [(where >= 0) & (where <= n - 1) for where, n in zip(at, image.shape[:2], strict=True)]
    return seen, (inside[0][:, None] & inside[1]).astype(image.dtype)


def _cubic(at: jax.Array, length: int) -> jax.Array:
    """[n, length]: the weights of pixels in what is at the places [n], by cubic convolution (Keys 1981)."""
    low = jnp.floor(at)
    out = jnp.zeros((len(at), length))
    for k in (-1, 0, 1, 2):
        away = jnp.abs(at - low - k)
        near = (_BEND + 2) * away**3 - (_BEND + 3) * away**2 + 1
        far = _BEND * (away**3 - 5 * away**2 + 8 * away - 4)
        place = jnp.clip(low + k, 0, length - 1).astype(jnp.int32)
        out += jnp.where(away <= 1, near, far)[:, None] * jax.nn.one_hot(place, length)
    return out
