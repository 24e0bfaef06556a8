"""Checks of the Python that runs flows, and of the embedded server in it."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from procworker.cli.doctor.findings import Finding, fail, ok, warn
from procworker.errors import ConfigurationError
from procworker.local.server import last_words, local_server, version_of
from procworker.system.interpreter import find_interpreter, inherited

IMPORT_SECONDS = 30.0
SHOWN = ("fastapi", "sqlalchemy", "pydantic", "uvicorn")
# As an engine starts: the current directory comes first, whatever lies there.
_PROBE = """
import json, sys, time
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try: return version(name)
    except PackageNotFoundError: return None
began = time.monotonic()
import prefect.engine
found = {name: find(name) for name in sys.argv[1:]}
print(json.dumps({"python": sys.version.split()[0], "seconds": time.monotonic() - began,
    "place": prefect.__file__, "versions": found}))
"""


@dataclass
class Flows:
    """The Python that runs flows, as far as it could be found out."""

    path: str | None = None
    prefect: str | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def look_at_python(python: str | None) -> Flows:
    """Find it, and have it import what every flow run imports."""
    flows, what = Flows(), "python"
    try:
        interpreter = find_interpreter(python, os.environ)
    except ConfigurationError as error:
        text, _, fix = str(error).partition(": pip install")
        flows.findings = fail(what, text, f"pip install{fix}" if fix else "name another by --python")
        return flows
    flows.path, flows.prefect = interpreter.path, interpreter.prefect_version
    text = f"{flows.path}, Prefect {flows.prefect}"
    fix = f"repair its packages: {flows.path} -m pip install --force-reinstall prefect=={flows.prefect}"
    try:
        done = subprocess.run(
            [flows.path, "-c", _PROBE, *SHOWN],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            stdin=subprocess.DEVNULL,
            env=inherited(os.environ, flows.path),
        )
    except subprocess.TimeoutExpired:
        flows.findings = fail(
            what, f"{text}: not imported within {IMPORT_SECONDS:g} s", "is its disk slow, or a network's?"
        )
        return flows
    if done.returncode:
        flows.findings = fail(what, f"{text} cannot be imported: {last_words(done.stderr)}", fix)
        return flows
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    flows.versions = told["versions"]
    text = f"{flows.path}, Python {told['python']}, Prefect {flows.prefect}, imported in {told['seconds']:.1f} s"
    if Path(told["place"] or "").absolute().parent in (here := Path.cwd(), here / "prefect"):
        flows.findings = warn(what, f"{text}, from the current directory", f"is {told['place']} meant? Else rename it")
    else:
        flows.findings = ok(what, text)
    return flows


def embedded_server(flows: Flows, is_needed: bool) -> list[Finding]:
    """Is anything known to keep this Prefect's server from starting? Nothing is started for that."""
    what, bad = "embedded server", fail if is_needed else warn
    if os.name == "nt":
        return warn(what, "needs Linux or macOS", "set PREFECT_API_URL")
    if flows.prefect is None or not flows.versions:
        return []
    install = f"{flows.path} -m pip install"
    known = {name: version_of(version) for name, version in flows.versions.items() if version}
    prefect = version_of(flows.prefect)
    if missing := [name for name in ("fastapi", "uvicorn", "sqlalchemy") if name not in known]:
        return bad(what, f"there is no {', '.join(missing)}", f"{install} prefect=={flows.prefect}")
    limits: list[tuple[str, tuple[int, ...], bool]] = [
        ("fastapi", (0, 139), (3, 4) <= prefect < (3, 8)),
        ("fastapi", (0, 140), True),
        ("sqlalchemy", (2, 1), True),
        ("pydantic", (2, 11), (3, 0) <= prefect < (3, 1)),
    ]
    for name, limit, concerns in limits:
        if concerns and known.get(name, ()) >= limit:
            below = ".".join(map(str, limit))
            text = f"Prefect {flows.prefect} is known not to work with {name} {flows.versions[name]}"
            return bad(what, text, f"{install} '{name}<{below}'")
    return ok(what, f"nothing known is in its way (fastapi {flows.versions['fastapi']}; --server starts it)")


async def start_server(flows: Flows) -> list[Finding]:
    """Start it on a new database, and end it again."""
    what, began = "embedded server", time.monotonic()
    if flows.path is None:
        return []
    ready = 0.0
    say: Callable[[str], None] = lambda line: None  # noqa: E731
    with tempfile.TemporaryDirectory(prefix="procworker-doctor-") as home:
        try:
            async with local_server(flows.path, Path(home), keep_seconds=0, say=say, version=flows.prefect) as server:
                ready = time.monotonic() - began
                version = server.version
        except ConfigurationError as error:
            text, _, fix = str(error).partition(f": {flows.path} -m pip")
            advice = (
                f"{flows.path} -m pip{fix}" if fix else "see what it says; `procworker[prefect]` brings one that starts"
            )
            return fail(what, text, advice)
    return ok(what, f"Prefect {version} was ready on a new database after {ready:.1f} s, and has ended")
