"""The command `mdf`: its sub-commands come from the entry points of the installed packages."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

from mdf_sdk.errors import InputError, MDFError

_ORDER = (
    "import-data",
    "check-data",
    "split",
    "train",
    "evaluate",
    "train-cnn",
    "baseline",
    "ablate",
    "scaling",
    "card",
    "export",
    "compile",
    "predict",
    "info",
    "verify",
    "doctor",
    "parity",
    "benchmark",
    "soak",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0 is success, 1 a negative answer, 2 an error with its cure on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, broken = _build_parser()
    if words and words[0] in broken:
        print(f"mdf {words[0]}: cannot be loaded: {broken[words[0]]}", file=sys.stderr)
        return 2
    try:
        args = parser.parse_args(words)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except MDFError as error:
        print(f"{' '.join(['mdf', *words[:1]])}: {error}", file=sys.stderr)
        if "--json" in words:
            document = {"error": {"type": type(error).__name__, "message": str(error)}}
            print(json.dumps(document))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has gone, as in `mdf info ENGINE | head -1`; keep the interpreter from flushing
        # at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """What it cannot read is an error like any other; its commands' parsers are of this class.

    Options are written out: one that a later release adds would make an abbreviation ambiguous.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise InputError(f"{message}. See what there is: {self.prog} --help")


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """Make the parser of all commands that load; of the others, return the reason by name."""
    parser = _Parser(prog="mdf", description="Train, export and run MDF-MLLM.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    found = {entry.name: entry for entry in entry_points(group="mdf.commands")}
    names = [name for name in _ORDER if name in found] + sorted(found.keys() - set(_ORDER))
    broken = {}
    for name in names:
        try:
            found[name].load()(subparsers)
        except Exception as error:  # one package's fault must not take the others' commands away
            broken[name] = f"{type(error).__name__}: {error}"
    if broken:
        parser.epilog = f"Not available here: {', '.join(broken)}"
    return parser, broken


if __name__ == "__main__":
    raise SystemExit(main())
