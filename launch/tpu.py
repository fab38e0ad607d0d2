"""`python -m launch tpu create|run|collect|delete`: TPU VMs of Google Cloud, by the commands of gcloud.

    python -m launch tpu create --name pod --zone us-central2-b --type v4-32      # also --spot, --queued
    python -m launch tpu run --name pod --zone us-central2-b -- python -m ncsn train cifar10_edm --out runs/edm
    python -m launch tpu collect --name pod --zone us-central2-b --folder runs/edm
    python -m launch tpu delete --name pod --zone us-central2-b

`run` copies the committed state of this working tree to every worker, installs it with the extra `tpu`, and starts the
command on all of them; `lib.shard.start` finds the others through JAX's detection of TPUs.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import jobs
from lib.config import parse
from lib.process import UserError

USAGE = "python -m launch tpu create|run|collect|delete --name NAME --zone ZONE [--dry-run] [-- COMMAND...]"
_ARCHIVE, _HOME = "gradient-fields.tar.gz", "gradient-fields"


@dataclass(frozen=True)
class Tpu:
    """TPU VMs: create, run, collect, delete."""

    name: str = ""
    """of the TPU VM, or of the queued resource"""
    zone: str = ""
    """e.g. us-central2-b"""
    project: str | None = None
    """(default: gcloud's own)"""
    type: str = "v5litepod-8"
    """create: accelerator, e.g. v4-32"""
    version: str = "v2-alpha-tpuv5-lite"
    """create: software version that suits the accelerator, e.g. tpu-ubuntu2204-base for v4"""
    spot: bool = False
    """create: may be preempted"""
    queued: bool = False
    """create, delete: as a queued resource, which waits for capacity"""
    folder: str = ""
    """collect: run folder, from worker 0 to the same place here"""
    dry_run: bool = False
    """print the commands, and do nothing"""

    def __post_init__(self) -> None:
        if self.name:
            jobs.check_name(self.name)


def main(args: Sequence[str]) -> None:
    if not args or args[0] not in _ACTIONS:
        raise UserError(f"usage: {USAGE}")
    action, rest = args[0], list(args[1:])
    words, command = jobs.split(rest, USAGE) if action == "run" else (rest, [])
    options = parse(Tpu(), words, f"python -m launch tpu {action}")
    if not options.name or not options.zone:
        raise UserError("--name and --zone are needed")
    for line in _ACTIONS[action](options, command):
        jobs.execute(line, dry_run=options.dry_run)


def create(options: Tpu, command: Sequence[str]) -> list[list[str]]:
    del command
    if options.queued:
        words = ["gcloud", "compute", "tpus", "queued-resources", "create", options.name, "--node-id", options.name,
                 "--accelerator-type", options.type, "--runtime-version", options.version]  # fmt: skip
    else:
        words = ["gcloud", "compute", "tpus", "tpu-vm", "create", options.name,
                 "--accelerator-type", options.type, "--version", options.version]  # fmt: skip
    return [[*words, *_where(options), *(["--spot"] if options.spot else [])]]


def run(options: Tpu, command: Sequence[str]) -> list[list[str]]:
    """Archive of the committed state, copy, install, start."""
    told = shlex.join(jobs.resumable(command))
    install = (
        f"rm -rf {_HOME} && mkdir {_HOME} && tar xzf {_ARCHIVE} -C {_HOME} && cd {_HOME} && "
        "python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"
    )
    start = f"cd {_HOME} && PATH=$PWD/.venv/bin:$PATH GRADIENT_FIELDS_CLUSTER=tpu {told}"
    return [
        ["git", "archive", "--format=tar.gz", f"--output={_ARCHIVE}", "HEAD"],
        [*_tpu_vm("scp"), _ARCHIVE, f"{options.name}:", *_where(options), "--worker=all"],
        [*_tpu_vm("ssh"), options.name, *_where(options), "--worker=all", "--command", install],
        [*_tpu_vm("ssh"), options.name, *_where(options), "--worker=all", "--command", start],
    ]


def collect(options: Tpu, command: Sequence[str]) -> list[list[str]]:
    del command
    if not options.folder or Path(options.folder).is_absolute():
        raise UserError("collect needs --folder, the run folder as the command named it, relative to the project")
    target = str(Path(options.folder).parent)
    source = f"{options.name}:{_HOME}/{options.folder}"
    return [[*_tpu_vm("scp"), "--recurse", source, target, *_where(options), "--worker=0"]]


def delete(options: Tpu, command: Sequence[str]) -> list[list[str]]:
    del command
    kind = (
        ["queued-resources", "delete", options.name, "--force"]
        if options.queued
        else ["tpu-vm", "delete", options.name]
    )
    return [["gcloud", "compute", "tpus", *kind, *_where(options), "--quiet"]]


def _tpu_vm(verb: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "tpu-vm", verb]


def _where(options: Tpu) -> list[str]:
    return ["--zone", options.zone, *(["--project", options.project] if options.project else [])]


_ACTIONS = {"create": create, "run": run, "collect": collect, "delete": delete}
