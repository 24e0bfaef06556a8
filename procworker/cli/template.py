"""Print the default base job template of a worker type."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-t", "--type", default="process", help="worker type (default: process)")


def execute(arguments: argparse.Namespace) -> int:
    import json

    from procworker.cli.common import worker_class

    print(json.dumps(worker_class(arguments.type).get_default_base_job_template(), indent=2))
    return 0
