"""`python -m launch COMMAND ...`"""

import sys
from collections.abc import Sequence

from launch import demo, local, reproduce, studies
from lib.run import UserError, command

_USAGE = (
    "usage: python -m launch local [--processes N] [--grace-s S] -- COMMAND... | "
    "python -m launch reproduce hnn|metrics|ncsn | python -m launch demo"
)


def main(args: Sequence[str]) -> None:
    if args and args[0] == "local":
        sys.exit(local.main(args[1:]))
    if args and args[0] == "reproduce":
        _reproduce(args[1] if len(args) > 1 else "", args[2:])
        return
    if args and args[0] == "demo":
        demo.main(args[1:])
        return
    if args and args[0] in ("-h", "--help"):
        print(_USAGE)
        return
    raise UserError(f"unknown launch command {args[0]!r}; {_USAGE}" if args else _USAGE)


def _reproduce(what: str, args: Sequence[str]) -> None:
    if what == "hnn":
        reproduce.main(args)
    elif what == "metrics":
        from launch import metrics_check  # imports JAX, which the launcher itself does without

        metrics_check.main(args)
    elif what in studies.STUDIES:
        studies.main(what, args)
    else:
        raise UserError(f"reproduce what? Choose from hnn, metrics, {', '.join(studies.STUDIES)}")


if __name__ == "__main__":
    sys.exit(command(main))
