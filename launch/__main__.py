"""`python -m launch COMMAND ...`"""

import sys
from collections.abc import Callable, Sequence

from launch import demo, kubernetes, local, plan, reproduce, slurm, status, studies, sweep, tpu
from lib.process import UserError, command, dispatch

_USAGE = """usage: python -m launch COMMAND ...

  local --processes N -- COMMAND     processes on this machine that find each other
  slurm [--nodes N] -- COMMAND       a batch job that requeues itself after a preemption
  kubernetes --image I -- COMMAND    a JobSet on a node pool of GPUs or TPUs
  tpu create|run|collect|delete      TPU VMs of Google Cloud
  sweep --grid FIELD=A,B -- COMMAND  one run per combination of values, here or as a Slurm array
  status RUN...                      how far run folders are
  plan PRESET --devices N            what a step costs on devices that are not here
  reproduce hnn|metrics|ncsn|stylize the runs behind docs/results, and their pages
  demo                               a small run of every package

COMMAND is any training, e.g. python -m ncsn train mnist_edm --out RUN. Engines take --dry-run."""


def _returning(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], None]:
    return lambda args: sys.exit(main(args))


def main(args: Sequence[str]) -> None:
    dispatch(COMMANDS, _USAGE, args)


def _reproduce(args: Sequence[str]) -> None:
    what, args = (args[0], args[1:]) if args else ("", args)
    if what == "hnn":
        reproduce.main(args)
    elif what == "metrics":
        from launch import metrics_check  # imports JAX, which the launcher itself does without

        metrics_check.main(args)
    elif what in studies.STUDIES:
        studies.main(what, args)
    else:
        raise UserError(f"reproduce what? Choose from hnn, metrics, {', '.join(studies.STUDIES)}")


COMMANDS = {
    "local": _returning(local.main),
    "slurm": slurm.main,
    "kubernetes": kubernetes.main,
    "tpu": tpu.main,
    "sweep": sweep.main,
    "status": status.main,
    "plan": plan.main,
    "reproduce": _reproduce,
    "demo": demo.main,
}

if __name__ == "__main__":
    sys.exit(command(main))
