"""Measure procworker and Prefect's own worker side by side, and print the ratios. Linux only."""

import argparse
import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

from procworker.errors import ProcworkerError
from scripts.benchmarks import cancel, cold, figures, footprint, lab, scan

SUBJECTS = {"cancel": cancel, "cold": cold, "footprint": footprint, "scan": scan}
"""Modules with a docstring and measure(lab, arguments) -> rows made by figures.compare."""


def main() -> None:
    parser = argparse.ArgumentParser("scripts/bench", description=__doc__)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--prefect", default=os.environ.get("PROCWORKER_TEST_PREFECT38"), help="its Python")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, too")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="cancel, cold: runs of each side (7)")
    parser.add_argument("--query-seconds", type=float, metavar="S", help="cold: poll interval (each side's default)")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="footprint: idle time (60)")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    module = SUBJECTS[arguments.subject]
    try:
        with nullcontext() if module is scan else lab.opened(arguments.prefect) as bench:
            rows = module.measure(bench, arguments)
    except ProcworkerError as error:
        sys.exit(f"scripts/bench: {error}")
    prefect = bench.prefect if bench else "-"
    print(module.__doc__, figures.table(rows, prefect), sep="\n")
    if arguments.json:
        arguments.json.write_text(json.dumps({"prefect": prefect, "python": sys.version, "rows": rows}))


def interrupt(*_: object) -> None:
    """Stop, and let nothing interrupt the tidying up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(130)


main()
