"""What every feature network looks like to those who measure with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Features(NamedTuple):
    """What a network says about a batch of images."""

    pool: jax.Array  # float32 [b, dimension], the features that distances are measured on
    logits: jax.Array  # float32 [b, classes], before the softmax (or before the sigmoids)


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A frozen network as a measuring instrument; metrics carry its `name` in theirs."""

    name: str
    apply: Callable[[Any, jax.Array], Features]
    """pure: `apply(params, images)` with images uint8 [b, h, w, channels] of a size that `sizes_px` allows"""
    params: Any
    dimension: int
    classes: int
    channels: int
    sizes_px: tuple[int, ...] | None
    """the image sizes (height = width) it was trained for; None: it resizes any size itself"""
    weights_sha256: str
    """of the bytes of its weight file: two scores compare only if this is the same"""
    preprocessing: str
    """what it does to pixels, for the protocol of a score"""
