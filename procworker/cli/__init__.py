"""The `procworker` command: one module per subcommand; what they need is imported only when they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from procworker import __version__
from procworker.cli import doctor, logs, preview, run, server, start, status, stop, template

COMMANDS = {
    "start": start,
    "run": run,
    "status": status,
    "logs": logs,
    "stop": stop,
    "preview": preview,
    "doctor": doctor,
    "template": template,
    "server": server,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="procworker",
        description="A Prefect process worker that does not need Prefect.",
        epilog="Settings are Prefect's (PREFECT_API_URL and so on): environment, .env, prefect.toml, profiles.",
    )
    parser.add_argument("--version", action="version", version=f"procworker {__version__}")
    parser.add_argument(
        "--profile", metavar="NAME", help="use this Prefect profile; its values win over the environment"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module in COMMANDS.items():
        summary, _, more = (module.__doc__ or "").partition("\n")
        raw = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=summary, description=summary, epilog=more.strip(), formatter_class=raw)
        module.add_arguments(command)
        command.set_defaults(execute=module.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (README: exit codes)."""
    argv = sys.argv[1:] if argv is None else argv
    if list(argv) == ["--version"]:  # asked often, by machines: not worth building the parser for
        print(f"procworker {__version__}")
        return 0
    arguments = build_parser().parse_args(argv)
    _spare_what_httpx_imports()
    _give_no_commands()
    try:
        code: int = arguments.execute(arguments)
        if sys.stdout is not None:  # it is, when it was closed before we started
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        from procworker.cli.errors import exit_code, sentence
        from procworker.errors import single
        from procworker.system.printer import PRINTER

        if isinstance(single(error), BrokenPipeError):  # the reader of our output has left
            sys.stdout = None
            return 141
        PRINTER.say(f"procworker: error: {sentence(error)}\n", "stderr")
        PRINTER.drain()
        return exit_code(error)
    return code


def _give_no_commands() -> None:
    """Nothing that others wrote, such as output, messages and names, is a command to the CI system that we run in."""
    if not os.environ.keys().isdisjoint(("GITHUB_ACTIONS", "GITLAB_CI", "BUILDKITE")):
        from procworker.cli.ci import detect
        from procworker.system.printer import PRINTER

        PRINTER.harmless = detect(os.environ, PRINTER.command).harmless


def _spare_what_httpx_imports() -> None:
    """Keep httpx from importing a command of its own, with click, rich and pygments where they are installed: 5 MB."""
    if "httpx" not in sys.modules:
        sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # see importlib: "halted; None"
