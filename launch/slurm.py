"""`python -m launch slurm [options] -- COMMAND`: a batch job that is put back into the queue after every preemption.

The script starts one process per task with srun; `lib.shard.start` finds the others through Slurm's variables. Slurm
sends SIGTERM to the processes before the time limit (and `scancel --signal=TERM` at any time): they save and exit with
75, upon which the script requeues its job, which goes on with `--resume`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import jobs
from lib.config import parse
from lib.process import EXIT_PREEMPTED, UserError
from lib.run import write_text

USAGE = "python -m launch slurm [--nodes N] [--gpus-per-node G] [--dry-run] -- COMMAND..."


@dataclass(frozen=True)
class Slurm:
    """Writes a batch script for a command and submits it."""

    name: str = "gradient-fields"
    """of the job"""
    nodes: int = 1
    """machines"""
    tasks_per_node: int | None = None
    """processes on each (default: one per GPU, or one)"""
    gpus_per_node: int = 0
    """GPUs on each, one per process"""
    cpus_per_task: int | None = None
    """cores of each process (default: the cluster's)"""
    memory: str | None = None
    """of each node, e.g. 64G"""
    time: str = "24:00:00"
    """limit, [days-]hours:minutes:seconds"""
    signal_s: int = 120
    """seconds before the limit at which processes are told to save"""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    extra: tuple[str, ...] = ()
    """further options of sbatch without their dashes, e.g. reservation=jax"""
    setup: tuple[str, ...] = ()
    """shell lines before the command, e.g. "module load cuda" """
    folder: Path = Path("runs/slurm")
    """for the script and the output of the job"""
    dry_run: bool = False
    """print the script and the command, and do nothing"""

    def __post_init__(self) -> None:
        jobs.check_name(self.name)
        if min(self.nodes, self.tasks) < 1 or self.gpus_per_node < 0 or self.signal_s < 1:
            raise UserError("nodes, tasks-per-node and signal-s must be at least 1, gpus-per-node not negative")
        if self.gpus_per_node and self.tasks not in (1, self.gpus_per_node):
            raise UserError("tasks-per-node must be 1 or gpus-per-node: a process has one GPU, or all of its node")
        if not re.fullmatch(r"(\d+-)?\d{1,3}:\d{2}:\d{2}", self.time):
            raise UserError(f"time is {self.time!r}, not [days-]hours:minutes:seconds")

    @property
    def tasks(self) -> int:
        return self.tasks_per_node if self.tasks_per_node is not None else max(self.gpus_per_node, 1)


def main(args: Sequence[str]) -> None:
    words, command = jobs.split(args, USAGE)
    options = parse(Slurm(), words, "python -m launch slurm")
    submit(options, script(options, jobs.resumable(command)), options.folder / f"{options.name}.sbatch")


def submit(options: Slurm, text: str, path: Path) -> str:
    """Writes the script and hands it to sbatch; returns the number of the job ("" with dry_run)."""
    if options.dry_run:
        print(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    told = jobs.execute(["sbatch", "--parsable", str(path)], dry_run=options.dry_run)
    job = told.strip().split(";")[0]
    if job:
        print(f"job {job}; output: {options.folder}/{options.name}-{job}*.out")
    return job


def script(options: Slurm, command: Sequence[str], *, array: int | None = None) -> str:
    """The batch script. With `array`, a job array of so many tasks, each the line of its number in the file COMMAND."""
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks,
        "gpus-per-node": options.gpus_per_node or None,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.memory,
        "time": options.time,
        "signal": f"TERM@{options.signal_s}",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "array": None if array is None else f"0-{array - 1}",
        "output": f"{options.folder.absolute()}/{options.name}-{'%j' if array is None else '%A_%a'}.out",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH --{option}" for option in options.extra)]
    task = 'bash -c "$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" {})"'
    what = shlex.join(command) if array is None else task.format(shlex.quote(command[0]))
    job = "$SLURM_JOB_ID" if array is None else "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            *options.setup,
            # One task that fails must not leave the others waiting for it.
            f"srun --kill-on-bad-exit=1 {what}",
            "code=$?",
            f'if [ "$code" -eq {EXIT_PREEMPTED} ]; then scontrol requeue "{job}"; fi',
            "exit $code",
            "",
        ]
    )
