"""Find out whether procworker can work here, and say what mends it where it cannot.

Each line is a check: ok, warn (it works, but) or FAIL, with the remedy below it. Nothing is changed anywhere.
Exit code 1 when something failed.

Examples:
  procworker doctor
  procworker doctor --pool laptop --queue default
  procworker doctor --python .venv --server
  procworker doctor --json
"""

from __future__ import annotations

import argparse

LONGEST_TEXT = 4000
TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from procworker.cli.doctor.check_python import Flows
    from procworker.cli.doctor.check_server import Server
    from procworker.cli.doctor.findings import Finding
    from procworker.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-p", "--pool", metavar="NAME", help="look at this work pool, its queues, late runs and workers, too")
    add("-q", "--queue", metavar="NAME", help="the work queue of that pool to look at (default: all)")
    add("--python", metavar="PATH", help="Python that runs the flows: a path, a venv or tox env directory")
    add("--server", action="store_true", help="start the embedded server on a temporary database (10-30 s)")
    add("--json", action="store_true", help="print JSON, for a machine to read")


def execute(arguments: argparse.Namespace) -> int:
    import json

    from procworker.cli.common import run_loop, say
    from procworker.cli.doctor.findings import told
    from procworker.cli.errors import FAILED
    from procworker.cli.layout import warnings_heard
    from procworker.errors import ConfigurationError

    if arguments.queue and not arguments.pool:
        raise ConfigurationError("--queue names a queue of a work pool: name that by --pool")
    with warnings_heard():  # what is wrong is told by a finding
        findings = run_loop(_examine, arguments)
    failed = any(finding.status == "FAIL" for finding in findings)
    if arguments.json:
        say(json.dumps({"ok": not failed, "checks": [finding.row() for finding in findings]}, indent=2))
    else:
        say("\n".join(told(findings)))
    return FAILED if failed else 0


async def _examine(arguments: argparse.Namespace) -> list[Finding]:
    """Look at everything at the same time; what is wrong with one thing hides no other."""
    import os

    import anyio
    import anyio.to_thread

    from procworker.cli.doctor import check_host, check_python, check_server
    from procworker.cli.doctor.findings import broken, fail, guarded, ok

    settings, findings = _settings(arguments.profile)
    flows = check_python.Flows()
    server: Server | None = None
    starting: list[Finding] = []

    async def look_at_python() -> None:
        nonlocal flows, starting
        try:
            flows = await anyio.to_thread.run_sync(check_python.look_at_python, arguments.python)
            if arguments.server:
                starting = await check_python.start_server(flows)
        except Exception as error:
            flows.findings = flows.findings or broken("python", error)

    async def ask_server(settings: Settings) -> None:
        nonlocal server
        try:
            server = await check_server.ask(settings, arguments.pool)
        except Exception as error:
            findings.extend(broken("API", error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look_at_python)
        if settings and settings.api_url:
            tasks.start_soon(ask_server, settings)
    if settings and not settings.api_url:
        text = "no PREFECT_API_URL: `run` and `start --local` use an embedded server"
        findings += ok("API", text)
        if arguments.pool:
            findings += fail(f"work pool {arguments.pool!r}", "only a server knows it", "set PREFECT_API_URL")
    if server is not None:
        findings += _of_server(server, arguments.queue, flows)
    alone = settings is not None and not settings.api_url
    findings += flows.findings
    findings += starting or guarded("embedded server", check_python.embedded_server, flows, alone)
    if settings is not None:
        home = settings.state_home
        findings += guarded("state directory", check_host.state_directory, home, alone)
        findings += guarded("dead workers", check_host.left_behind, home)
        findings += guarded("kernel", check_host.kernel, home)
    findings += guarded("temporary directory", check_host.temporary_directory)
    findings += guarded("open files", check_host.open_files)
    findings += guarded("container", check_host.container, os.environ)
    findings += guarded("CI", check_host.automation, os.environ)
    return [_masked(settings, finding) for finding in findings]


def _settings(profile: str | None) -> tuple[Settings | None, list[Finding]]:
    """Read them, and say where they come from or what is wrong with them."""
    from procworker.cli.doctor.check_server import settings_read
    from procworker.cli.doctor.findings import broken, fail
    from procworker.cli.layout import warnings_heard
    from procworker.errors import ConfigurationError
    from procworker.settings import Settings

    with warnings_heard() as heard:
        try:
            settings = Settings.load(profile=profile)
        except ConfigurationError as error:
            return None, fail(
                "settings", str(error), "correct what is named; what depends on settings was not looked at"
            )
        except Exception as error:
            return None, broken("settings", error)
    return settings, settings_read(settings, heard)


def _of_server(server: Server, queue: str | None, flows: Flows) -> list[Finding]:
    """What its answers mean; where it is not there, nothing more can be said."""
    from procworker.cli.doctor import check_pool, check_server
    from procworker.cli.doctor.findings import guarded

    findings = guarded("API", check_server.reachable, server)
    if not server.is_there:
        return findings
    findings += guarded("auth", check_server.admitted, server)
    findings += guarded("versions", check_server.versions, server, flows.prefect)
    findings += guarded("clock", check_server.clock, server)
    if server.pool is not None:
        findings += guarded("work pool", check_pool.work_pool, server, queue)
        findings += guarded("late runs", check_pool.late_runs, server, queue)
        findings += guarded("workers", check_pool.workers, server)
    return findings


def _masked(settings: Settings | None, finding: Finding) -> Finding:
    """The finding without anything that settings or environment show to be secret."""
    import os

    from procworker.cli.doctor.findings import Finding
    from procworker.redaction import Mask, secrets_in

    mask = Mask(secrets_in(os.environ) | (settings.secrets() if settings else frozenset()))
    return Finding(finding.status, mask(finding.what), mask(finding.text)[:LONGEST_TEXT], mask(finding.fix))
