"""Modules of convolutions: those of flax, by way of `lib.conv`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn

from lib.conv import conv_general_dilated, conv_transpose
from lib.sums import biased


class Conv(nn.Conv):
    """`flax.linen.Conv` with `lib.conv.conv_general_dilated`, `minimal`: same fields, same parameter names.

    Networks that measure give the field `conv_general_dilated` the function itself.
    """

    conv_general_dilated: Any = functools.partial(conv_general_dilated, minimal=True)

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[*batch, spatial..., c] -> [*batch, spatial..., features]."""
        if not self.use_bias:
            return super().__call__(inputs)
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        plain = nn.Conv(**known | {"use_bias": False, "parent": self, "name": "plain"})
        nn.share_scope(self, plain)
        y = plain(inputs)
        return biased(y, self.param("bias", self.bias_init, (self.features,), self.param_dtype).astype(y.dtype))


class ConvTranspose(nn.ConvTranspose):
    """`flax.linen.ConvTranspose` with `lib.conv.conv_transpose`, `minimal`: same fields, same parameter names.

    Raises ValueError for padding "CIRCULAR", which only flax's own has.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """[*batch, spatial..., c] -> [*batch, spatial..., features]."""
        kernel_size = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        spatial = len(kernel_size)
        if self.padding == "CIRCULAR":
            raise ValueError("padding 'CIRCULAR' is not supported here: use flax.linen.ConvTranspose")
        channels = (inputs.shape[-1], self.features)
        shape = kernel_size + (channels[::-1] if self.transpose_kernel else channels)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            if self.mask.shape != shape:
                raise ValueError(f"the mask must have the kernel's shape {shape}, not {self.mask.shape}")
            kernel *= self.mask
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        inputs, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        batch_shape = inputs.shape[: inputs.ndim - spatial - 1]
        y = conv_transpose(
            inputs.reshape(-1, *inputs.shape[len(batch_shape) :]),
            kernel,
            _per_dimension(self.strides, spatial),
            nn.linear.canonicalize_padding(self.padding, spatial),
            _per_dimension(self.kernel_dilation, spatial),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            minimal=True,
        )
        if bias is not None:
            y = biased(y, bias)
        return y.reshape(*batch_shape, *y.shape[1:])


def _per_dimension(value: int | Sequence[int] | None, spatial: int) -> tuple[int, ...]:
    if value is None or isinstance(value, int):
        return (1 if value is None else value,) * spatial
    return tuple(value)
