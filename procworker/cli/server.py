"""Show or stop the embedded Prefect servers of this user.

Examples:
  procworker server status
  procworker server stop
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["status", "stop"])
    parser.add_argument("--json", action="store_true", help="print JSON, for a machine to read")


def execute(arguments: argparse.Namespace) -> int:
    import json

    from procworker.cli.common import run_loop
    from procworker.local.server import server_status, stop_servers
    from procworker.settings import Settings

    home = Settings.load(profile=arguments.profile).state_home
    servers = server_status(home) if arguments.action == "status" else run_loop(stop_servers, home)
    if arguments.json:
        print(json.dumps(servers, indent=2, default=str))
        return 0
    verb = "stopped" if arguments.action == "stop" else "running"
    for server in servers:
        print(f"Prefect {server['version']} {verb} at {server['url']} (pid {server['pid']}, {server['database']})")
    if not servers:
        print("No embedded server is running.")
    return 0
