"""A camera for the pixel pendulum: a rod hanging from a pivot near the top of a small grey image."""

import jax.numpy as jnp
from jax import Array

SIZE_PX = 28
# The image is 1.4 wide and high, with the pivot 0.15 below its top edge: the small swings of the task fill it, as in
# the paper's cropped frames. Rod length and width are those of gym's Pendulum-v0.
EXTENT = 1.4
PIVOT_BELOW_TOP = 0.15
ROD_LENGTH = 1.0
ROD_RADIUS = 0.1


def render(theta: Array) -> Array:
    """The rod at angle theta [rad, scalar; 0 hangs down, positive swings right] as [28, 28] in [0, 1], rod bright.

    Anti-aliased by the signed distance to a capsule, with an edge one pixel wide, so that it moves by fractions of a
    pixel. Pure: vmap it for films.
    """
    pixel = EXTENT / SIZE_PX
    centres = (jnp.arange(SIZE_PX) + 0.5) * pixel
    x, down = centres[None, :] - EXTENT / 2, centres[:, None] - PIVOT_BELOW_TOP
    tip_x, tip_down = ROD_LENGTH * jnp.sin(theta), ROD_LENGTH * jnp.cos(theta)
    along = jnp.clip((x * tip_x + down * tip_down) / ROD_LENGTH**2, 0.0, 1.0)
    distance = jnp.hypot(x - along * tip_x, down - along * tip_down) - ROD_RADIUS
    return jnp.clip(0.5 - distance / pixel, 0.0, 1.0)
