"""Options of every command that runs an engine."""

import argparse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add `--device`, `--threads` and `--json`."""
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of a call; the runtime's choice when left out"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )
