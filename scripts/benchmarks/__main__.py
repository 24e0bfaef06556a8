"""Measure procworker and Prefect's own worker side by side, and print the ratios. Linux only."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from procworker.errors import ProcworkerError
from scripts.benchmarks import cold, figures, footprint, lab

SUBJECTS = {"cold": cold, "footprint": footprint}
"""A subject is a module: a docstring, add_arguments(parser), and measure(lab, arguments) -> list of rows."""


def main() -> None:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    for name, module in SUBJECTS.items():
        subject = subjects.add_parser(
            name, help=str(module.__doc__).splitlines()[0], description=module.__doc__
        )
        prefect = os.environ.get("PROCWORKER_TEST_PREFECT38")
        subject.add_argument(
            "--prefect", default=prefect, metavar="PATH", help="a Python or venv with Prefect"
        )
        subject.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, too")
        module.add_arguments(subject)
        subject.set_defaults(module=module)
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with lab.opened(arguments.prefect) as bench:
            facts = {
                "prefect": bench.prefect,
                "python": sys.version,
                "cpus": os.cpu_count(),
                "load": os.getloadavg(),
            }
            rows = arguments.module.measure(bench, arguments)
        print(arguments.module.__doc__, figures.table(rows), sep="\n")
        if arguments.json:
            arguments.json.write_text(json.dumps({**facts, "figures": rows}, indent=1))
    except ProcworkerError as error:
        sys.exit(f"scripts/bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Stop, and let nothing interrupt the tidying up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


main()
