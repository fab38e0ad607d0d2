"""lib/conv.py and lib/layers.py against JAX and flax: values, first and second derivatives, in loops, on a mesh."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lib import conv, layers

LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}

# name: input sizes, kernel sizes, channels, features, keywords
CASES = {
    "same": ((7, 5), (3, 3), 2, 3, {}),
    "valid_even_kernel": ((7, 6), (4, 2), 2, 3, {"padding": "VALID"}),
    "same_lower_stride": ((7, 6), (4, 2), 2, 3, {"padding": "SAME_LOWER", "window_strides": (2, 3)}),
    "pointwise_stride": ((7, 5), (1, 1), 2, 3, {"window_strides": (2, 2)}),
    "stride": ((9, 8), (3, 4), 5, 6, {"window_strides": (2, 3)}),
    "stride_leaves_a_rest": ((8, 10), (3, 2), 2, 3, {"window_strides": (3, 4), "padding": "VALID"}),
    "dilated_kernel": ((9, 8), (3, 2), 2, 3, {"rhs_dilation": (2, 3)}),
    "dilated_kernel_stride": ((11, 10), (3, 3), 2, 3, {"rhs_dilation": (2, 1), "window_strides": (1, 3)}),
    "dilated_input": ((4, 5), (3, 4), 5, 6, {"lhs_dilation": (2, 3), "padding": ((1, 2), (3, 0))}),
    "everything": (
        (6, 7),
        (3, 2),
        4,
        6,
        {
            "window_strides": (2, 1),
            "lhs_dilation": (3, 2),
            "rhs_dilation": (1, 2),
            "padding": ((2, 3), (0, 4)),
            "feature_group_count": 2,
        },
    ),
    "asymmetric": ((7, 5), (3, 3), 2, 3, {"padding": ((0, 3), (2, 1))}),
    "negative_padding": ((8, 9), (3, 3), 2, 3, {"padding": ((-1, 2), (1, -3)), "window_strides": (1, 2)}),
    "more_padding_than_kernel": ((3, 4), (2, 2), 2, 3, {"padding": ((4, 3), (3, 5))}),
    "grouped": ((7, 5), (3, 3), 6, 4, {"feature_group_count": 2}),
    "depthwise": ((7, 5), (3, 3), 3, 6, {"feature_group_count": 3, "window_strides": (2, 1)}),
    "large_kernel_few_features": ((9, 12), (7, 9), 2, 3, {"padding": ((1, 3), (4, -1))}),
    "more_kernel_than_input": ((4, 3), (5, 5), 2, 3, {"window_strides": (2, 2)}),
    "more_kernel_transposed": ((2, 3), (5, 6), 2, 3, {"lhs_dilation": (2, 2), "padding": ((2, 3), (4, 1))}),
    "one_channel": ((9, 8), (3, 4), 1, 6, {"window_strides": (2, 3), "padding": ((2, 1), (-1, 4))}),
    "few_channels": ((7, 5), (3, 2), 3, 7, {"padding": ((0, 3), (4, 1))}),
    "few_features": ((8, 9), (3, 3), 6, 2, {"padding": ((-1, 2), (1, -3))}),
    "few_features_transposed": ((2, 3), (4, 3), 7, 1, {"lhs_dilation": (2, 3), "padding": ((2, 3), (-1, 5))}),
    "line": ((11,), (4,), 2, 3, {"window_strides": (3,), "rhs_dilation": (2,)}),
    "volume": ((5, 4, 6), (3, 2, 3), 2, 2, {"window_strides": (2, 1, 2)}),
}


def _arrays(case, dtype=np.float64, batch=2):
    sizes, kernel_sizes, channels, features, keywords = CASES[case]
    rng = np.random.default_rng(0)
    groups = keywords.get("feature_group_count", 1)
    x = rng.standard_normal((batch, *sizes, channels)).astype(dtype)
    k = rng.standard_normal((*kernel_sizes, channels // groups, features)).astype(dtype)
    settings = {
        "window_strides": (1,) * len(sizes),
        "padding": "SAME",
        "dimension_numbers": LAYOUTS[len(sizes)],
    }
    return x, k, settings | keywords


def _derivatives(convolution, x, k):
    """Value, gradient, and the gradient of a gradient penalty, all with respect to input and kernel."""

    def f(x, k):
        y = convolution(x, k)
        return jnp.sum(y * (y + jnp.arange(y.size).reshape(y.shape) % 7))

    def penalty(x, k):
        of_x, of_k = jax.grad(f, (0, 1))(x, k)
        return jnp.sum(of_x**2) + jnp.sum(of_k**2)

    return convolution(x, k), jax.grad(f, (0, 1))(x, k), jax.grad(penalty, (0, 1))(x, k)


def _both(derivatives, ours, theirs, *args):
    """`derivatives` of the two convolutions, compiled together, unoptimised: compiling is the cost."""
    both = jax.jit(
        lambda *args: (derivatives(ours, *args), derivatives(theirs, *args)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return both(*args)


def _assert_close(ours, theirs, rtol):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, float(np.abs(b).max(initial=0))))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_equal_jax_float64(case):
    with jax.enable_x64(True):
        x, k, settings = _arrays(case)
        ours, theirs = (partial(f, **settings) for f in (conv.conv_general_dilated, lax.conv_general_dilated))
        _assert_close(*_both(_derivatives, ours, theirs, x, k), 1e-12)


@pytest.mark.parametrize("case", ["same", "everything", "depthwise"])
def test_derivatives_equal_jax_float32(case):
    x, k, settings = _arrays(case, np.float32)
    ours, theirs = (partial(f, **settings) for f in (conv.conv_general_dilated, lax.conv_general_dilated))
    _assert_close(*_both(_derivatives, ours, theirs, x, k), 2e-5)


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16_and_preferred_element_type(preferred):
    x, k, settings = _arrays("stride", np.float32)
    settings |= {"preferred_element_type": preferred, "precision": "highest"}

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda x, k: jnp.sum(f(x, k, **settings).astype(jnp.float32)), (0, 1)))(
            jnp.asarray(x, jnp.bfloat16), jnp.asarray(k, jnp.bfloat16)
        )

    _assert_close(gradients(conv.conv_general_dilated), gradients(lax.conv_general_dilated), 1e-2)
    y = jax.eval_shape(partial(conv.conv_general_dilated, **settings), jnp.bfloat16(x), jnp.bfloat16(k))
    assert y.dtype == (preferred or jnp.bfloat16)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 3))])
@pytest.mark.parametrize(("strides", "dilation", "transpose_kernel"), [((2, 3), None, False), ((5, 1), (1, 2), True)])
def test_conv_transpose_equals_jax(padding, strides, dilation, transpose_kernel):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, k = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((4, 3, 3, 3))
        fixed = {"rhs_dilation": dilation, "transpose_kernel": transpose_kernel}
        ours, theirs = (
            partial(f, strides=strides, padding=padding, **fixed) for f in (conv.conv_transpose, lax.conv_transpose)
        )
        _assert_close(*_both(_derivatives, ours, theirs, x, k), 1e-12)


def test_inside_scan_jit_and_vmap():
    with jax.enable_x64(True):
        x, k, settings = _arrays("grouped")
        k_many = np.stack([k, 2 * k, k[::-1]])

        def trained(f, x, k):
            """Two SGD steps in a scan; the input is per-example, the kernel per-model."""

            def loss(k):
                return jnp.mean(f(x, k, **settings) ** 2)

            return lax.scan(lambda k, _: (k - 0.1 * jax.grad(loss)(k), loss(k)), k, length=2)

        def all_three(f):
            over_models = jax.vmap(partial(trained, f), in_axes=(None, 0))(x, k_many)
            over_inputs = jax.vmap(partial(trained, f), in_axes=(0, None))(np.stack([x, x + 1]), k)
            over_both = jax.vmap(partial(trained, f))(np.stack([x, x + 1, x - 1]), k_many)
            return over_models, over_inputs, over_both

        _assert_close(*_both(all_three, conv.conv_general_dilated, lax.conv_general_dilated), 1e-12)


def test_scanned_gradients_of_both_orders_compile_to_the_fast_dimension_order():
    x, k, settings = _arrays("everything", np.float32)
    f = partial(conv.conv_general_dilated, **settings)

    def step(k, _):
        return (k - jax.tree.reduce(jnp.add, _derivatives(f, x, k)[2][1]), None)

    compiled = jax.jit(lambda k: lax.scan(step, k, length=3)).lower(k).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", compiled)
    assert len(orders) >= 5
    assert set(orders) == {"b01f_01io->b01f"}
    assert "batch_group_count" not in compiled


def _compiled(case):
    """The program of a convolution with its gradients of both orders."""
    x, k, settings = _arrays(case, np.float32)
    f = partial(conv.conv_general_dilated, **settings)
    return jax.jit(lambda x, k: _derivatives(f, x, k)).lower(x, k).compile().as_text()


@pytest.mark.parametrize("case", ["stride", "dilated_input"])
def test_gradients_of_both_orders_compile_without_zeros_between_entries(case):
    compiled = _compiled(case)
    windows = re.findall(r" convolution\(.*window=\{([^}]*)\}", compiled)
    assert len(windows) >= 5
    assert not any("_dilate" in window for window in windows)


# name: input sizes, kernel sizes, channels, features, keywords
MINIMAL = {
    "same": ((9, 6), (3, 3), 16, 17, {}),
    "asymmetric": ((7, 8), (3, 3), 17, 16, {"padding": ((0, 3), (2, 1))}),
    "stride": ((15, 16), (5, 5), 5, 16, {"window_strides": (2, 2)}),
    "stride_of_half_a_kernel": ((14, 16), (4, 4), 5, 16, {"window_strides": (2, 2)}),
}


@pytest.fixture
def by_winograd(monkeypatch):
    """What of `lib.winograd` was called: "results", "kernel_gradient"."""
    called = set()

    def watch(name, function):
        monkeypatch.setattr(conv.winograd, name, lambda *args: called.add(name) or function(*args))

    for name in ("results", "kernel_gradient"):
        watch(name, getattr(conv.winograd, name))
    return called


@pytest.mark.parametrize("case", MINIMAL)
def test_derivatives_by_winograds_algorithm(case, by_winograd, monkeypatch):
    monkeypatch.setitem(CASES, case, MINIMAL[case])
    monkeypatch.setattr(conv, "_WORTH", {2: 0, 3: 0})
    monkeypatch.setattr(conv, "_WORTH_OF_GRADIENT", {2: 0, 3: 0})
    with jax.enable_x64(True):
        x, k, settings = _arrays(case, batch=16)
        ours, theirs = (partial(f, **settings) for f in (conv.conv_general_dilated, lax.conv_general_dilated))
        _assert_close(*_both(_derivatives, partial(ours, minimal=True), theirs, x, k), 1e-11)
    assert by_winograd == {"results", "kernel_gradient"}
    x, k = np.float32(x), np.float32(k)
    f = partial(conv.conv_general_dilated, minimal=True, **settings)
    compiled = jax.jit(lambda x, k: _derivatives(f, x, k)).lower(x, k).compile().as_text()
    assert " convolution(" not in compiled


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "channels", "features", "results", "gradient"),
    [(14, 3, 1, 64, 64, True, True), (14, 3, 1, 32, 32, False, True), (32, 3, 1, 64, 32, True, True),
     (14, 3, 1, 16, 16, False, False), (28, 4, 2, 32, 64, False, True), (28, 4, 2, 4, 16, False, False),
     (14, 4, 2, 64, 128, True, True), (14, 5, 2, 64, 128, True, True), (14, 2, 1, 256, 256, True, True),
     (4, 3, 1, 512, 512, True, True), (4, 3, 1, 1024, 1024, False, False)],
)  # fmt: skip
def test_winograds_algorithm_where_it_is_faster(
    size, kernel, stride, channels, features, results, gradient, by_winograd
):
    x, k = jnp.zeros((128, size, size, channels)), jnp.zeros((kernel, kernel, channels, features))
    f = partial(conv.conv_general_dilated, window_strides=(stride, stride), minimal=True,
                padding="SAME", dimension_numbers=LAYOUTS[2])  # fmt: skip
    jax.eval_shape(lambda x, k: jax.vjp(lambda k: f(x, k), k)[1](f(x, k)), x, k)
    assert [name in by_winograd for name in ("results", "kernel_gradient")] == [results, gradient]


@pytest.mark.parametrize(("dtype", "asked"), [(jnp.bfloat16, {}), (jnp.float32, {"precision": "highest"})])
def test_no_winograd_where_more_digits_are_needed(dtype, asked, monkeypatch):
    monkeypatch.setitem(CASES, "same_wide", ((9, 6), (3, 3), 80, 80, {}))
    x, k, settings = _arrays("same_wide", np.float32, batch=16)
    f = jax.jit(partial(conv.conv_general_dilated, minimal=True, **settings, **asked))
    assert " convolution(" in f.lower(jnp.asarray(x, dtype), jnp.asarray(k, dtype)).compile().as_text()


@pytest.mark.parametrize("case", ["one_channel", "few_features_transposed"])
def test_few_channels_or_features_compile_to_matrix_products(case):
    compiled = _compiled(case)
    assert " dot(" in compiled
    assert " convolution(" not in compiled


@pytest.mark.parametrize("case", ["more_kernel_than_input", "more_kernel_transposed"])
def test_small_inputs_compile_without_exchanging_input_and_kernel(case):
    compiled = _compiled(case)
    assert " dot(" in compiled
    assert "rhs_reversal" not in compiled
    x, k, settings = _arrays(case, np.float32)
    theirs = partial(lax.conv_general_dilated, **settings)
    assert "rhs_reversal" in jax.jit(theirs).lower(x, k).compile().as_text()


def test_replicated_operand_on_a_mesh():
    mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    x, k, settings = _arrays("stride", np.float32, batch=len(jax.devices()))

    def gradients(f, x, k):
        return jax.grad(lambda k: lax.psum(jnp.sum(f(x, k, **settings) ** 2), "data"))(k)

    ours, theirs = (
        jax.jit(jax.shard_map(partial(gradients, f), mesh=mesh, in_specs=(P("data"), P()), out_specs=P()))(x, k)
        for f in (conv.conv_general_dilated, lax.conv_general_dilated)
    )
    whole = jax.grad(lambda k: jnp.sum(lax.conv_general_dilated(x, k, **settings) ** 2))(k)
    _assert_close(ours, theirs, 1e-5)
    _assert_close(ours, whole, 1e-5)


def test_empty_batch():
    x, k, settings = _arrays("same", np.float32, batch=0)
    of_x, of_k = jax.grad(lambda x, k: jnp.sum(conv.conv_general_dilated(x, k, **settings)), (0, 1))(x, k)
    assert (of_x.shape, of_k.shape) == (x.shape, k.shape)
    assert not np.any(of_k)


def test_other_dimension_orders_batch_groups_and_backends_use_jax_itself(monkeypatch):
    x, k, settings = _arrays("same", np.float32)

    def own(*args, **kw):
        return "custom_vjp" in str(jax.make_jaxpr(partial(conv.conv_general_dilated, **kw))(*args))

    assert own(x, k, **settings)
    nchw = settings | {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}
    x_first, k_first = np.moveaxis(x, -1, 1), np.transpose(k, (3, 2, 0, 1))
    assert not own(x_first, k_first, **nchw)
    ours = conv.conv_general_dilated(x_first, k_first, **nchw)
    np.testing.assert_allclose(np.moveaxis(ours, 1, -1), conv.conv_general_dilated(x, k, **settings), rtol=1e-5)
    assert not own(x, np.concatenate([k, k[..., :1]], -1), **settings, batch_group_count=2)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not own(x, k, **settings)


def test_mistakes_raise_as_in_jax():
    x, k, settings = _arrays("same", np.float32)
    with pytest.raises(ValueError, match="padding by name"):
        conv.conv_general_dilated(x, k, **settings, lhs_dilation=(2, 2))
    with pytest.raises((TypeError, ValueError)):
        conv.conv_general_dilated(x, k[:, :, :1], **settings)
    with pytest.raises(ValueError, match="channels-last"):
        conv.conv_transpose(x, k, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    with pytest.raises(ValueError, match="FULL"):
        conv.conv_transpose(x, k, (1, 1), "FULL")
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(partial(conv.conv_general_dilated, **settings), (x, k), (x, k))


MODULES = {
    "conv": ("Conv", {"kernel_size": (3, 3), "strides": 2}),
    "conv_circular_grouped": (
        "Conv",
        {"kernel_size": (3, 2), "padding": "CIRCULAR", "feature_group_count": 3},
    ),
    "conv_dilated_bf16": ("Conv", {"kernel_size": (3, 3), "kernel_dilation": 2, "dtype": jnp.bfloat16}),
    "conv_input_dilation": ("Conv", {"kernel_size": (3, 3), "input_dilation": 2, "padding": 2}),
    "transpose": ("ConvTranspose", {"kernel_size": (4, 4), "strides": (2, 2)}),
    "transpose_kernel": (
        "ConvTranspose",
        {"kernel_size": (3, 2), "strides": (2, 3), "transpose_kernel": True},
    ),
    "transpose_plain": ("ConvTranspose", {"kernel_size": (3, 3), "use_bias": False, "padding": 1}),
    "transpose_bf16": ("ConvTranspose", {"kernel_size": (3, 3), "padding": "VALID", "dtype": jnp.bfloat16}),
}


@pytest.mark.parametrize(
    ("case", "shape"),
    [(case, (2, 7, 6, 3)) for case in MODULES]
    + [(case, shape) for case in ("conv", "transpose") for shape in ((7, 6, 3), (2, 3, 5, 4, 3))],
)
def test_linen_modules_equal_flax(case, shape):
    name, fields = MODULES[case]

    def model(module):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return module(features=6, bias_init=nn.initializers.normal(), **fields)(x)

        return Net()

    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)

    def run(source, x):
        return model(getattr(source, name)).init_with_output(jax.random.key(0), x)

    ours, theirs = _both(run, layers, nn, x)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    _assert_close(ours, theirs, 1e-5)


def test_linen_transpose_mask_and_circular():
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 3))
    mask = jnp.tril(jnp.ones((3, 3, 3, 4)))
    ours, theirs = (
        source.ConvTranspose(4, (3, 3), mask=mask).init_with_output(jax.random.key(0), x) for source in (layers, nn)
    )
    _assert_close(ours, theirs, 1e-5)
    with pytest.raises(ValueError, match="mask"):
        layers.ConvTranspose(4, (3, 3), mask=mask[:2]).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="CIRCULAR"):
        layers.ConvTranspose(4, (3, 3), padding="CIRCULAR").init(jax.random.key(0), x)
