"""Random changes of training images, inside the compiled step and by one key per example."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def augment(images: jax.Array, keys: jax.Array, *, shift_px: int, flip: bool, cutout_px: int, fill: int) -> jax.Array:
    """Shifted, mirrored and partly covered images: [b, h, w, c] -> [b, h, w, c], uint8, or float where none is covered.

    Shifts are up to `shift_px` in each direction, what comes in repeats the border; a square of `cutout_px` whose
    centre may be anywhere becomes `fill` (0: none).
    """
    size = images.shape[1:3]
    if shift_px:
        border = ((0, 0), (shift_px, shift_px), (shift_px, shift_px), (0, 0))
        images = jnp.pad(images, border, mode="edge")

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        shift_key, flip_key, cut_key = jax.random.split(key, 3)
        y, x = jax.random.randint(shift_key, (2,), 0, 2 * shift_px + 1)
        image = jax.lax.dynamic_slice(image, (y, x, 0), (*size, image.shape[-1]))
        if flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        if cutout_px:
            top, left = jax.random.randint(cut_key, (2,), 0, jnp.asarray(size)) - cutout_px // 2
            rows, columns = jnp.arange(size[0])[:, None], jnp.arange(size[1])
            covered = (rows >= top) & (rows < top + cutout_px) & (columns >= left) & (columns < left + cutout_px)
            image = jnp.where(covered[..., None], jnp.uint8(fill), image)
        return image

    return jax.vmap(one)(images, keys)
