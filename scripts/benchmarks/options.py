"""The command line: options of each subject, and those that all have."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

SIZES: dict[str, dict[str, float]] = {
    "cancel": {"runs": 3},
    "cold": {"runs": 3},
    "warm": {"runs": 3},
    "latency": {"rounds": 3},
    "throughput": {"rounds": 2},
    "overhead": {"runs": 60},
    "footprint": {"seconds": 20.0},
}
"""What `all` asks of a subject, so that all of them take half an hour."""


def parse(about: str, modules: Mapping[str, ModuleType]) -> argparse.Namespace:
    """Make a command of each subject, with what its OPTIONS say: name -> (default, meaning)."""
    parser = argparse.ArgumentParser("scripts/bench", description=about)
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    for name, module in modules.items():
        text = str(module.__doc__)
        command = subjects.add_parser(name, description=text, help=text.splitlines()[0])
        for option, (default, what) in module.OPTIONS.items():
            kind = float if default is None else type(default)
            shown = what if default is None else f"{what} ({default:g})"
            command.add_argument(f"--{option}", type=kind, default=default, metavar="N", help=shown)
        command.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file, too")
        command.add_argument("--svg", type=Path, metavar="DIR", help="draw SUBJECT.svg in this directory, too")
    command = subjects.add_parser("all", help="Every subject, in half an hour.")
    command.add_argument("--into", type=Path, default="bench-results", metavar="DIR", help="for SUBJECT.json and .svg")
    for command in subjects.choices.values():
        default = os.environ.get("PROCWORKER_TEST_PREFECT38")
        command.add_argument("--prefect", default=default, metavar="PYTHON", help="the Python that has Prefect")
    return parser.parse_args()


def sized(name: str, module: ModuleType, arguments: argparse.Namespace) -> argparse.Namespace:
    """Return what `all` means for one subject; what was asked of it alone stays as it is."""
    if arguments.subject != "all":
        return arguments
    options = {option.replace("-", "_"): default for option, (default, _) in module.OPTIONS.items()}
    files = {"json": arguments.into / f"{name}.json", "svg": arguments.into}
    return argparse.Namespace(prefect=arguments.prefect, **options | SIZES.get(name, {}) | files)
