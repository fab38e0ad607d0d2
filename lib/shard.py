"""Devices: one body, three compilers.

A step is written once. Its means go through `pmean`, its random numbers through `example_keys`; both find out while
tracing whether they run inside a mesh axis. `compile_step` then makes the step run under `jit` (one device),
`shard_map` (a mesh over any number of hosts) or `pmap` (one host). What has no batch to spread, such as one large
image, runs under `jit` on a mesh and says by `spread_pixels` what XLA is to divide.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lib import cluster
from lib.process import OTHERS, UserError

How = Literal["jit", "shard_map", "pmap"]
DATA = "data"
REPLICA = "replica"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def start(cpu_devices: int | None = None, *, convolutions: bool = True) -> None:
    """Prepares JAX before its first use: CPU devices, compile cache, and the other processes of a launch.

    XLA's CPU backend runs one program on one core, so `cpu_devices` defaults to one device per core (one per
    process under a launcher, which divides the cores itself). `convolutions=False`, for programs that have none, saves
    the threads that they need there: a third of the time of small products.
    """
    # By default XLA hands matrix products and convolutions to YNNPACK, which was slower wherever it was measured: the
    # gradient of a convolution to its weights 2 to 4 times on AVX2. Read when the backend starts.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=".strip()
    here = cluster.peers()
    if cpu_devices is None:
        cpu_devices = 1 if here else cores()
    # XLA shares one pool of NPROC threads (by default, cores) among its CPU devices. Where there are no more threads
    # than devices, convolutions inside loops give wrong numbers for the first images of a batch as soon as two
    # devices compute at the same time (seen with jaxlib 0.10.2; tests/test_shard.py).
    # So a smaller NPROC of the user's does not count.
    os.environ["NPROC"] = str(max(2 * cpu_devices, cores()) if convolutions else cores())
    jax.config.update("jax_num_cpu_devices", cpu_devices)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gradient-fields" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    # JAX's own SIGTERM handler would replace ours, and the run would neither save nor stop.
    jax.config.update("jax_enable_preemption_service", False)
    day_s = 24 * 3600  # the others wait at their end while process 0 evaluates
    if here:
        cluster.meet(here, cluster.wait_s())
        jax.distributed.initialize(*here, cluster_detection_method="deactivate", shutdown_timeout_seconds=day_s)
        # Where all fail alike, process 0 goes last: JAX ends by a signal those whose coordinator is gone.
        OTHERS.wait_s = 2.0 if here.number == 0 else 0.0
    elif cluster.on_tpu_pod():
        jax.distributed.initialize(shutdown_timeout_seconds=day_s)
        OTHERS.wait_s = 0.0


def primary() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def make_mesh(devices: int | None = None, axis: str = DATA) -> Mesh:
    """A mesh of one axis over the first `devices` devices of all hosts (default: all of them).

    Raises UserError where there are not so many, and where a process would have none of them.
    """
    available = jax.devices()
    if devices is not None and not 1 <= devices <= len(available):
        raise UserError(f"devices is {devices}, but there are {len(available)} ({available[0].platform})")
    chosen = np.asarray(available[: devices or len(available)])
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise UserError(f"devices is {devices}, but each of the {jax.process_count()} processes needs one")
    return Mesh(chosen, (axis,), axis_types=(AxisType.Auto,))


def most_devices(fits: Callable[[int], bool]) -> int:
    """How many devices to take where the user names no number: the most that `fits`. With other processes all."""
    available = len(jax.devices())
    if jax.process_count() > 1:
        return available
    return next(count for count in range(available, 0, -1) if fits(count))


def local_mesh() -> Mesh:
    """The devices of this process alone, for work that is not shared with others."""
    return Mesh(np.asarray(jax.local_devices()), (DATA,), axis_types=(AxisType.Auto,))


def _axis_bound(axis: str = DATA) -> bool:
    try:
        jax.lax.axis_index(axis)
    except NameError:
        return False
    return True


def pmean(tree: Any) -> Any:
    """The mean over the data axis; the identity outside one.

    The tree travels as one vector: a step then waits for one collective and not for one per array.
    """
    if not _axis_bound():
        return tree
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.lax.pmean(flat, DATA))


def equally_varying(*arrays: jax.Array) -> list[jax.Array]:
    """Inside shard_map: mark all as varying over the mesh axes that any of them varies over.

    JAX's own primitives do it implicitly; a custom_vjp has to, or the gradient of an operand that is equal on
    all devices would come back without the sum over them.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    ]


def varying(tree: Any) -> Any:
    """Marks replicated values as per-device ones, so that their gradients stay local until `pmean`.

    Without it `shard_map` would sum the gradients of replicated parameters on its own, and a following `pmean` would
    make them too large by the number of devices.
    """
    if not _axis_bound():
        return tree

    def cast(x: jax.Array) -> jax.Array:
        return x if DATA in jax.typeof(x).manual_axis_type.varying else jax.lax.pcast(x, DATA, to="varying")

    return jax.tree.map(cast, tree)


def alone() -> bool:
    """Whether one device computes what is traced here as it stands: inside a mesh axis, or as the only one.

    Elsewhere XLA may divide it (GSPMD), and would gather what a loop takes in parts.
    """
    return _axis_bound() or jax.local_device_count() == 1


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """One key per example of the local batch, [count], folded from its index in the *global* batch.

    The number of devices therefore changes no random number.
    """
    first = jax.lax.axis_index(DATA) * count if _axis_bound() else 0
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def compile_step(
    fn: Callable[..., tuple[Any, Any]],
    mesh: Mesh,
    how: How = "shard_map",
    *,
    in_specs: tuple[Any, ...] = (P(), P(DATA)),
    out_specs: tuple[Any, Any] = (P(), P()),
) -> Callable[..., tuple[Any, Any]]:
    """Compiles `fn(state, *batches) -> (state, metrics)`, donating the state.

    `in_specs` and `out_specs` are prefix trees of PartitionSpecs, as for `jax.shard_map`. The three ways give the
    same result up to the order of floating-point sums. Under `jit` no axis is bound: on more than one device XLA itself
    divides the work, from the specs and `spread_pixels` (GSPMD). `pmap` takes the devices of one host.
    """
    if how == "jit":
        if mesh.size == 1:
            return jax.jit(fn, donate_argnums=0)
        is_spec = lambda x: isinstance(x, P)  # noqa: E731
        ins, outs = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (in_specs, out_specs), is_leaf=is_spec)
        return jax.jit(
            fn, donate_argnums=0, in_shardings=ins, out_shardings=outs, compiler_options=compiler_options(mesh)
        )
    if how == "shard_map":
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options(mesh))
    return _compile_pmap(fn, mesh, in_specs, out_specs)


def spread_pixels(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Images [b, h, w, c] with their rows divided over the devices, or their columns where only these divide.

    Inside a program that `jit` compiled for the mesh: XLA then exchanges the borders that convolutions need. An image
    of which neither divides is left to XLA.
    """
    axis = next((axis for axis in (1, 2) if x.shape[axis] % mesh.size == 0), None)
    if mesh.size == 1 or axis is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*[None] * axis, DATA)))


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """Where CPU devices are cores, each computes alone: threads of one would only take the core of another."""
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        return {"xla_cpu_multi_thread_eigen": False}
    return None


def _compile_pmap(fn: Callable, mesh: Mesh, in_specs: tuple, out_specs: tuple) -> Callable:
    """`pmap` wants an explicit device axis where a spec shards; it is split off before the call."""
    (axis,) = mesh.axis_names
    devices = list(mesh.devices.flat)
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    position = lambda spec: list(spec).index(axis) if axis in spec else None  # noqa: E731
    in_axes = jax.tree.map(position, in_specs, is_leaf=is_spec)
    out_axes = jax.tree.map(position, out_specs, is_leaf=is_spec)
    mapped = jax.pmap(fn, axis, in_axes=in_axes, out_axes=out_axes, devices=devices)

    def split(spec: P, tree: Any) -> Any:
        at = position(spec)
        if at is None:
            return tree
        return jax.tree.map(
            lambda x: x.reshape(*x.shape[:at], len(devices), x.shape[at] // len(devices), *x.shape[at + 1 :]), tree
        )

    def call(*args: Any) -> tuple[Any, Any]:
        return mapped(
            *(jax.tree.map(split, spec, arg, is_leaf=is_spec) for spec, arg in zip(in_specs, args, strict=True))
        )

    return call


def shard_largest(tree: Any, mesh: Mesh, *, least: int = 2**12) -> Any:
    """PartitionSpecs for parameters and optimiser states that do not fit one device (fully sharded data parallelism).

    Of every array of at least `least` numbers the largest axis that the devices divide is spread over them; XLA gathers
    what a layer needs, and scatters the sums of gradients.
    """

    def spec(x: Any) -> P:
        axes = [i for i, n in enumerate(x.shape) if n % mesh.size == 0 and n >= mesh.size]
        if math.prod(x.shape) < least or not axes or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return P()
        largest = max(axes, key=lambda i: x.shape[i])
        return P(*[None] * largest, DATA)

    return jax.tree.map(spec, tree)


def make_state(build: Callable[[], Any], mesh: Mesh, *, sharded: bool = False) -> Any:
    """What `build()` computes, whole on every device; or spread as `shard_largest` says, and never whole anywhere."""
    if not sharded:
        return place(build(), mesh)
    specs = shard_largest(jax.eval_shape(build), mesh)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
    return jax.jit(build, out_shardings=shardings)()


def place(tree: Any, mesh: Mesh, spec: Any = P()) -> Any:
    """Puts host arrays (the same on every process) or device arrays onto the mesh.

    `spec`: a PartitionSpec, or a prefix tree of them. Raises UserError where an axis does not divide evenly over the
    devices.
    """
    return jax.tree.map(lambda spec, part: _place(part, mesh, spec), spec, tree, is_leaf=lambda x: isinstance(x, P))


def _place(tree: Any, mesh: Mesh, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)
    spread = [i for i, axis in enumerate(spec) if axis is not None]

    def put(x: Any) -> jax.Array:
        for i in spread:
            if x.shape[i] % mesh.size:
                raise UserError(f"{x.shape[i]} rows do not divide evenly over {mesh.size} devices")
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            # Typed keys cannot be put onto other processes' devices, their bits can.
            bits = jax.device_put(np.asarray(jax.random.key_data(x)), sharding)
            return _wrap_keys(jax.random.key_impl(x), sharding)(bits)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable and sharding.is_fully_addressable):
            x = np.asarray(x)  # each process has all of it; Orbax cannot save what JAX makes of device arrays here
        return jax.device_put(x, sharding)

    return jax.tree.map(put, tree)


@functools.cache  # or every call would compile
def _wrap_keys(impl: Any, sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(functools.partial(jax.random.wrap_key_data, impl=impl), out_shardings=sharding)


def fetch(tree: Any) -> Any:
    """Device arrays as NumPy arrays on every process, gathered where they are spread over hosts."""

    def get(x: jax.Array) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(get, tree)
