"""`python -m launch COMMAND ...`"""

import sys
from collections.abc import Sequence

from launch import demo, local, reproduce
from lib.run import UserError, command

_USAGE = (
    "usage: python -m launch local [--processes N] [--grace-s S] -- COMMAND... | "
    "python -m launch reproduce hnn|metrics | python -m launch demo"
)


def main(args: Sequence[str]) -> None:
    if args and args[0] == "local":
        sys.exit(local.main(args[1:]))
    if args and args[0] == "reproduce":
        if args[1:2] == ["metrics"]:
            from launch import metrics_check  # imports JAX, which the launcher itself does without

            metrics_check.main(args[2:])
        else:
            reproduce.main(args[1:])
        return
    if args and args[0] == "demo":
        demo.main(args[1:])
        return
    if args and args[0] in ("-h", "--help"):
        print(_USAGE)
        return
    raise UserError(f"unknown launch command {args[0]!r}; {_USAGE}" if args else _USAGE)


if __name__ == "__main__":
    sys.exit(command(main))
