"""What a step of training costs on devices that are not here: compiled for a virtual mesh, and read from the program.

found = cost(step, state, batch, make_mesh(256))       # shapes suffice; nothing is computed
predicted_s(found, Machine(flops_per_s=4e14, link_bytes_per_s=4e11, network_bytes_per_s=5e10, per_host=8))
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lib.process import UserError
from lib.shard import DATA, How, compile_step


class Outline(NamedTuple):
    """A training in shapes: what a step is, and what it takes. Nothing of it needs data."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    state: Any
    batch: Any
    batch_spec: Any = P(DATA)
    """a prefix tree: what of the batch is not rows of examples is whole on each device"""
    unit: int = 1
    """a device takes a multiple of so many rows"""

    def over(self, devices: int) -> Outline:
        """This, with as many more rows as the devices need to have the same."""
        each = devices * self.unit

        def more(spec: P, part: Any) -> Any:
            if spec != P(DATA):
                return part
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((-(-x.shape[0] // each) * each, *x.shape[1:]), x.dtype), part
            )

        batch = jax.tree.map(more, self.batch_spec, self.batch, is_leaf=lambda x: isinstance(x, P))
        return self._replace(batch=batch)

    @property
    def rows(self) -> int:
        """Examples of a step, over all devices."""
        specs = jax.tree.map(
            lambda spec, part: [x.shape[0] for x in jax.tree.leaves(part)] if spec == P(DATA) else [],
            self.batch_spec, self.batch, is_leaf=lambda x: isinstance(x, P),
        )  # fmt: skip
        return max(jax.tree.leaves(specs))


def examples(count: int, shape: tuple[int, ...], *, labels: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as sources give it: images as bytes, with classes; points as numbers."""
    if len(shape) == 1:
        return {"x": jax.ShapeDtypeStruct((count, *shape), jnp.float32)}
    rows = {"image": jax.ShapeDtypeStruct((count, *shape), jnp.uint8)}
    return rows | ({"label": jax.ShapeDtypeStruct((count,), jnp.int32)} if labels else {})


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r"=\s+(?P<shape>\([^()]*\)|\S+)\s+"
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"(?P<type>[a-z]+\d*)\[(?P<sides>[\d,]*)\]")


@dataclass(frozen=True)
class Cost:
    """Of one step, on each device."""

    devices: int
    flops: float
    collectives: tuple[tuple[str, int], ...]
    """(kind, bytes of its result), in the order of the program"""
    argument_bytes: int
    """state and batch"""
    temporary_bytes: int
    """beside them, at most"""
    state_bytes: int
    """parameters, optimiser, averages: the part of one device"""

    @property
    def communicated_bytes(self) -> int:
        return sum(size for _, size in self.collectives)


@dataclass(frozen=True)
class Machine:
    """What devices can do. Numbers are the user's: those of a data sheet are never reached."""

    flops_per_s: float
    """of one device, as it is reached"""
    link_bytes_per_s: float
    """between the devices of a host, per device and direction"""
    network_bytes_per_s: float = math.inf
    """between hosts, per host and direction"""
    per_host: int = 8
    """devices of a host"""
    latency_s: float = 0.0
    """of a collective"""

    def __post_init__(self) -> None:
        if min(self.flops_per_s, self.link_bytes_per_s, self.network_bytes_per_s, self.per_host) <= 0:
            raise UserError("what devices can do must be positive")
        if not self.latency_s >= 0:
            raise UserError("a latency must not be negative")


def cost(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    batch: Any,
    mesh: Mesh,
    *,
    batch_spec: Any = P(DATA),
    state_spec: Any = P(),
    how: How = "shard_map",
) -> Cost:
    """Compiles `step(state, batch)`, arrays or shapes of the whole batch, for the mesh.

    Raises UserError where the batch does not divide over its devices.
    """
    if mesh.size == 1:
        how = "jit"
    compiled = compile_step(step, mesh, how, in_specs=(state_spec, batch_spec), out_specs=(state_spec, P()))
    placed = _shapes(state, mesh, state_spec), _shapes(batch, mesh, batch_spec)
    lowered = compiled.lower(*placed)  # type: ignore[attr-defined]
    # The program is read and never run: no time for the machine's code.
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    memory = program.memory_analysis()
    flops = program.cost_analysis().get("flops", 0.0)
    shards = jax.tree.map(lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize, placed[0])
    return Cost(
        devices=mesh.size,
        flops=float(flops),
        collectives=tuple(collectives(program.as_text())),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        state_bytes=sum(jax.tree.leaves(shards)),
    )


def _shapes(tree: Any, mesh: Mesh, spec: Any) -> Any:
    def shape(spec: P, part: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        for leaf in jax.tree.leaves(part) if spec == P(DATA) else ():
            if leaf.shape[0] % mesh.size:
                raise UserError(f"{leaf.shape[0]} examples do not divide evenly over {mesh.size} devices")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), part)

    return jax.tree.map(shape, spec, tree, is_leaf=lambda x: isinstance(x, P))


def collectives(program: str) -> list[tuple[str, int]]:
    """(kind, bytes of its result on each device) of every collective in the text of a compiled program."""
    return [(found["kind"], _size(found["shape"])) for found in _COLLECTIVE.finditer(program)]


def _size(shape: str) -> int:
    return sum(
        _BYTES[array["type"]] * math.prod(int(n) for n in array["sides"].split(",") if n)
        for array in _ARRAY.finditer(shape)
        if array["type"] in _BYTES
    )


def predicted_s(found: Cost, machine: Machine) -> float:
    """Seconds of a step: computation, then communication (none of it hidden behind computation).

    An all-reduce of B bytes over g devices of a host and h hosts: each device sends and receives 2 B (g - 1) / g over
    its links, and each host 2 B (h - 1) / h over the network; half of both for an all-gather that results in B bytes
    and for a reduce-scatter of as many.
    """
    group = min(found.devices, machine.per_host)
    hosts = max(1, math.ceil(found.devices / machine.per_host))
    total = found.flops / machine.flops_per_s
    for kind, size in found.collectives:
        passes = {"all-reduce": 2, "reduce-scatter": found.devices}.get(kind, 1)  # the latter results in a part
        total += machine.latency_s + passes * size * (group - 1) / group / machine.link_bytes_per_s
        total += passes * size * (hosts - 1) / hosts / machine.network_bytes_per_s
    return total
