"""The other processes of a run: who they are, how they are waited for, and what is said when one is gone.

A launcher says it by three variables, GRADIENT_FIELDS_COORDINATOR (host:port of process 0), GRADIENT_FIELDS_PROCESSES
and GRADIENT_FIELDS_PROCESS (number of this one; GRADIENT_FIELDS_LOCAL is the number of its only GPU); else they are
read from what Slurm (a step of srun) or Open MPI set.
On TPUs (GRADIENT_FIELDS_CLUSTER=tpu, or several TPU_WORKER_HOSTNAMES) JAX finds them itself.

Nobody waits for ever: processes meet before JAX connects them, and the line of an error names those that did not come;
a process that is lost in training ends the others with exit code 75, upon which schedulers start all of them again.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple, NoReturn

from lib.process import EXIT_PREEMPTED, UserError, end, seconds_of, tell

WAIT_VARIABLE = "GRADIENT_FIELDS_WAIT_S"
"""how long processes wait for each other at the start, and for a step of training; seconds"""
_WAIT_S = 600.0
_POLL_S, _ANSWER_S = 0.1, 2.0
_PORTS = (61440, 4096)  # from which one is derived from the number of a job


class Peers(NamedTuple):
    """What a process is told of the others."""

    coordinator: str
    """host:port of process 0"""
    count: int
    number: int
    """of this process"""
    local: int | None = None
    """number of this process on its machine, where each is to have one GPU; None: all that there are"""


def peers(environment: Mapping[str, str] | None = None) -> Peers | None:
    """The peers that the environment tells of; None for a process alone, and on TPUs.

    Raises UserError for variables that are not numbers, and for Open MPI on several machines, which does not tell where
    process 0 is.
    """
    env = os.environ if environment is None else environment
    if "GRADIENT_FIELDS_COORDINATOR" in env:
        count, number = (_number(env, f"GRADIENT_FIELDS_{name}") for name in ("PROCESSES", "PROCESS"))
        if not 0 <= number < count:
            raise UserError(f"GRADIENT_FIELDS_PROCESS is {number} of {count} processes")
        local = _number(env, "GRADIENT_FIELDS_LOCAL", -1)
        return Peers(env["GRADIENT_FIELDS_COORDINATOR"], count, number, None if local < 0 else local)
    if "SLURM_STEP_NODELIST" in env and _number(env, "SLURM_NTASKS", 1) > 1:
        host = first_host(env["SLURM_STEP_NODELIST"])
        # With one task per node, as many GPUs as there are; with one per GPU, its own.
        alone = _number(env, "SLURM_NTASKS") == _number(env, "SLURM_STEP_NUM_NODES", 1)
        local = None if alone else _number(env, "SLURM_LOCALID", 0)
        port = _port(_number(env, "SLURM_JOB_ID"))
        return Peers(f"{host}:{port}", _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID"), local)
    count = _number(env, "OMPI_COMM_WORLD_SIZE", 1)
    if count > 1:
        if _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE") < count:
            raise UserError("Open MPI on several machines: set GRADIENT_FIELDS_COORDINATOR=HOST:PORT of process 0, "
                            "GRADIENT_FIELDS_PROCESSES and GRADIENT_FIELDS_PROCESS")  # fmt: skip
        job = sum(map(ord, env.get("OMPI_MCA_ess_base_jobid", env.get("PMIX_NAMESPACE", ""))))
        return Peers(f"127.0.0.1:{_port(job)}", count, _number(env, "OMPI_COMM_WORLD_RANK"),
                     _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"))  # fmt: skip
    return None


def on_tpu_pod(environment: Mapping[str, str] | None = None) -> bool:
    env = os.environ if environment is None else environment
    return env.get("GRADIENT_FIELDS_CLUSTER") == "tpu" or "," in env.get("TPU_WORKER_HOSTNAMES", "")


def first_host(nodes: str) -> str:
    """Of a list as Slurm abbreviates it: node[003-007,9],other."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if found is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}: no host in it")
    return found[1] + (found[2] or "")


def _port(job: int) -> int:
    return _PORTS[0] + job % _PORTS[1]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise UserError(f"{name} must be a number, not {env.get(name)!r}") from None


def wait_s() -> float:
    """How long to wait for other processes. Raises UserError where the environment's time is none."""
    return seconds_of(WAIT_VARIABLE, _WAIT_S)


def meet(here: Peers, timeout_s: float) -> None:
    """Returns once all processes are there. Raises UserError that names those that did not come in time.

    JAX's own connection ends the whole process by a signal when one is missing. So they meet here first, on the port
    that JAX takes afterwards: each tells process 0 its number, which answers all of them when the last has come.
    """
    deadline = time.monotonic() + timeout_s
    host, _, port = here.coordinator.rpartition(":")
    if not (host and port.isdigit()):
        raise UserError(f"{here.coordinator!r} is no HOST:PORT of process 0")
    missing = _gather(int(port), here.count, deadline) if here.number == 0 else _report(here, host, int(port), deadline)
    if missing:
        which = ", ".join(map(str, missing))
        raise UserError(
            f"{'process' if len(missing) == 1 else 'processes'} {which} of {here.count} did not come within "
            f"{timeout_s:g} s ({WAIT_VARIABLE} sets another time)"
        )


def _gather(port: int, count: int, deadline: float) -> list[int]:
    """Process 0: those that are missing at the end, which the others are told."""
    connected: dict[int, socket.socket] = {}
    try:
        with socket.create_server(("", port), backlog=count) as server:
            while len(connected) < count - 1 and time.monotonic() < deadline:
                server.settimeout(max(min(_POLL_S, deadline - time.monotonic()), 1e-3))
                with contextlib.suppress(TimeoutError):
                    peer, _ = server.accept()
                    peer.settimeout(_ANSWER_S)
                    number = _read_number(peer)
                    if 0 < number < count:
                        connected[number] = peer
                    else:
                        peer.close()
    except OSError as error:
        raise UserError(f"process 0 cannot listen on port {port}: {error.strerror}") from None
    missing = [i for i in range(1, count) if i not in connected]
    for peer in connected.values():
        with contextlib.suppress(OSError), peer:
            peer.sendall((",".join(map(str, missing)) + "\n").encode())
    return missing


def _read_number(peer: socket.socket) -> int:
    """What a process tells first; -1 from a stranger."""
    try:
        return int(peer.makefile().readline())
    except (ValueError, OSError):
        return -1


def _report(here: Peers, host: str, port: int, deadline: float) -> list[int]:
    """Another process: those that are missing at the end, process 0 where it never answered."""
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), _POLL_S)) as process_0:
                process_0.sendall(f"{here.number}\n".encode())
                process_0.settimeout(max(deadline - time.monotonic(), 0) + _ANSWER_S)
                line = process_0.makefile().readline()
                if line:
                    return [int(i) for i in line.split(",") if i.strip()]
        except OSError:
            pass
        time.sleep(_POLL_S)
    return [0]


class Watchdog:
    """Ends this process where a step of training takes longer than `limit_s`: a collective waits for a process that is
    gone or hangs. The newest checkpoint is good, and the exit code is that of a preemption."""

    def __init__(self, limit_s: float):
        self._limit_s, self._done = limit_s, threading.Event()
        self._seen = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def beat(self) -> None:
        """Something was finished."""
        self._seen = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(min(_POLL_S, self._limit_s)):
            if time.monotonic() - self._seen > self._limit_s:
                leave(f"no step was finished in {self._limit_s:g} s: another process hangs or is gone")


@contextlib.contextmanager
def losing_a_peer_ends() -> Iterator[None]:
    """A collective that fails because a process is gone ends this one at once, with one line.

    Not by an exception: the way out would wait for that process again.
    """
    try:
        yield
    except ValueError as error:  # what reading an array raises with jax 0.10.2 where gloo has lost a connection
        if "Gloo" in str(error) or "coordination service" in str(error).lower():
            leave("another process is gone")
        raise


def leave(message: str) -> NoReturn:
    """Ends this process without waiting for anybody."""
    tell(f"stopped: {message}; --resume goes on from the newest checkpoint")
    end(EXIT_PREEMPTED)
