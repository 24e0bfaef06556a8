"""The shape of the package: who may import whom, what importing does, and the names that others build on."""

from __future__ import annotations

import ast
import configparser
import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic.json_schema import GenerateJsonSchema
from workers import settings_for

import procworker
from procworker.testing.api import PrefectApi

PACKAGE = Path(procworker.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

LAYERS = [
    {"errors", "home", "redaction"},
    {"settings", "template", "loops", "logs", "health", "exits"},
    {"server", "system"},
    {"configuration"},
    {"outcome", "pool", "registry", "submission"},
    {"job", "record", "report", "sources"},
    {"claim"},
    {"run"},
    {"cancels", "idleness", "infrastructure", "intake", "vitals"},
    {"shift"},
    {"worker"},
    {"process_job"},
    {"process", "local"},
    {"heir"},
    {"cli", "testing"},
    {"__main__", "procworker"},
]
"""Each part may import from the lines above its own. Parts on one line do not know each other."""

NO_PROCESSES = {
    *("configuration", "outcome", "pool", "registry", "submission", "job", "record", "report", "sources"),
    *("claim", "run", "cancels", "idleness", "infrastructure", "intake", "shift", "vitals", "worker"),
}
"""Parts that could import system/ by their place, but must not know that processes exist."""

SHAPES = "procworker.server.models"
"""All that configuration.py may know of server/."""

DEPENDENCIES = {"anyio", "httpx", "psutil", "pydantic", "tomli"}

PLUGIN = "procworker.testing.plugin"
"""The one module that may know pytest, for it is pytest that imports it."""

LONGEST = 400
LONGER = {"worker.py": 420}
"""Files that are still too long, with the lines they have now: a number may fall, and no name may be added."""


class Import(NamedTuple):
    """One import statement's target; `typing` when only type checkers see it, `late` when a function runs it."""

    target: str
    typing: bool
    late: bool


@cache
def imports(module: str) -> list[Import]:
    """Everything a module imports, wherever the statement stands."""
    return list(_imports(ast.parse(MODULES[module].read_text(encoding="utf-8")), False, False))


def _imports(node: ast.AST, typing: bool, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, typing, late) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (Import(_resolve(child.module, alias.name), typing, late) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from _imports(child, True, late)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from _imports(child, typing, late or function)


def _resolve(place: str | None, name: str) -> str:
    """`from a import b` reaches a.b when that is a module of ours, else a."""
    whole = f"{place}.{name}"
    return whole if whole in MODULES else str(place)


def part(module: str) -> str:
    """procworker.server.client belongs to server, procworker.run to run."""
    return module.split(".")[1] if "." in module else module


def depth(name: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if name in layer]
    assert found, f"{name} has no place in LAYERS: give it one"
    return found[0]


# An import for types only is counted as well: it costs nothing at run time, but whoever reads or changes the module
# has to know the other one. The same holds for imports inside functions.
@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_lead_downward_only(module: str) -> None:
    own = part(module)
    for target in {found.target for found in imports(module) if found.target.startswith("procworker.")}:
        if part(target) != own:
            assert depth(part(target)) < depth(own), f"{module} must not know {target}"
        assert not (own in NO_PROCESSES and part(target) == "system"), f"{module} must not know {target}"
        assert not (own == "configuration" and part(target) == "server" and target != SHAPES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_of_the_package_itself_only_the_version_is_imported(module: str) -> None:
    names = [
        alias.name
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "procworker"
        for alias in node.names
    ]
    assert set(names) <= {"__version__"}


def test_there_are_no_import_cycles() -> None:
    graph = {module: {found.target for found in imports(module)} & set(MODULES) - {"procworker"} for module in MODULES}
    assert set(TopologicalSorter(graph).static_order()) >= set(MODULES) - {"procworker"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_the_declared_dependencies_are_imported(module: str) -> None:
    needed = {found.target.split(".")[0] for found in imports(module) if not found.typing}
    foreign = needed - set(sys.stdlib_module_names) - {"procworker"}
    late = {found.target.split(".")[0] for found in imports(module) if found.late}

    own = {"pytest"} if module == PLUGIN else set()
    assert foreign - DEPENDENCIES - own <= {"prefect"} & late, "Prefect may be used where it is, and only there"


def test_the_declared_dependencies_are_these() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = config["options"]["install_requires"].split("\n")
    assert {line.split()[0] for line in required if line.strip()} == DEPENDENCIES
    assert "py.typed" in config["options.package_data"]["procworker"]
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", [pytest.param(path, id=name) for name, path in sorted(MODULES.items())])
def test_modules_say_in_a_sentence_what_they_are_for_and_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(PACKAGE).as_posix()
    lines = len(text.splitlines())

    assert not text or ast.get_docstring(ast.parse(text))
    assert lines <= LONGER.get(name, LONGEST)
    assert name not in LONGER or lines > LONGEST, f"{name} is short enough now: take it from the list"


# The public face


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_offers_what_it_says() -> None:
    assert sorted(procworker.__all__) == procworker.__all__
    for name in procworker.__all__:
        found = getattr(procworker, name)
        assert isinstance(found, type)
        assert inspect.getdoc(found)
        assert found.__module__.startswith("procworker.")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        procworker.Nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = [alias.name for node in statements if str(node.module).startswith("procworker.") for alias in node.names]
    assert sorted(seen) == procworker.__all__


@pytest.mark.parametrize("module", ["procworker", "procworker.cli", "procworker.__main__"])
def test_importing_loads_none_of_the_heavy_libraries(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert not {"anyio", "asyncio", "httpx", "pydantic", "psutil", "prefect"} & set(loaded)


def test_what_is_for_tests_is_loaded_only_by_tests() -> None:
    known = {found.target for module in MODULES if part(module) != "testing" for found in imports(module)}
    assert not [target for target in known if target.startswith("procworker.testing")]


def test_what_is_for_tests_is_found_by_name_and_needs_no_pytest() -> None:
    import procworker.testing

    names = procworker.testing.__all__
    loaded = python(f"import sys; from procworker.testing import {', '.join(names)}; print(*sys.modules)").split()
    assert "procworker.testing.worker" in loaded
    assert not {"pytest", "_pytest", PLUGIN} & set(loaded)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        procworker.testing.Nothing  # noqa: B018


def test_a_name_loads_only_what_it_needs() -> None:
    loaded = python("import sys; from procworker import Settings; print(*sys.modules)").split()
    assert "procworker.settings" in loaded
    assert not {"httpx", "procworker.worker"} & set(loaded)


def world(files: Path) -> dict[str, Any]:
    """Everything about this process that embedding a worker must leave alone."""
    loggers = [logging.getLogger(), *map(logging.getLogger, ("procworker", "prefect", "asyncio", "httpx"))]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "wakeup": wakeup(),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "logging": [(log.name, log.level, log.propagate, log.disabled, list(log.handlers)) for log in loggers],
        "disabled": logging.root.manager.disable,
        "path": list(sys.path),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
        "files": sorted(files.rglob("*")),
        "umask": umask(),
    }


def wakeup() -> int:
    previous = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(previous, warn_on_full_buffer=False)
    return previous


def umask() -> int:
    previous = os.umask(0o077)
    os.umask(previous)
    return previous


def test_constructing_a_worker_does_nothing_to_the_world(tmp_path: Path) -> None:
    from procworker.process import ProcessWorker

    before, threads = world(tmp_path), threading.active_count()
    worker = ProcessWorker("pool", name="w", limit=2)

    assert world(tmp_path) == before
    assert threading.active_count() == threads
    assert not worker.is_setup


async def test_using_a_worker_does_nothing_to_the_world(server: PrefectApi, tmp_path: Path) -> None:
    from procworker.process import ProcessWorker

    before = world(tmp_path)
    async with ProcessWorker("pool", settings=settings_for(server)) as worker:
        assert worker.is_setup
        assert world(tmp_path) == before

    assert world(tmp_path) == before


# Prefect's names: who wrote a worker on prefect.workers.base changes one import line


class PrefectBaseWorker:
    """The public members of Prefect 3.8's BaseWorker."""

    def __init__(
        self,
        work_pool_name,
        work_queues=None,
        name=None,
        prefetch_seconds=None,
        create_pool_if_not_found=True,
        limit=None,
        heartbeat_interval_seconds=None,
        *,
        base_job_template=None,
    ): ...

    @property
    def client(self): ...
    @property
    def limiter(self): ...
    @property
    def work_pool(self): ...
    @staticmethod
    def get_all_available_worker_types(): ...
    @staticmethod
    def get_worker_class_from_type(type): ...
    @classmethod
    def get_default_base_job_template(cls): ...
    @classmethod
    def get_description(cls): ...
    @classmethod
    def get_documentation_url(cls): ...
    @classmethod
    def get_logo_url(cls): ...
    def get_flow_run_logger(self, flow_run): ...
    def get_name_slug(self): ...
    def get_status(self): ...
    def is_worker_still_polling(self, query_interval_seconds): ...
    async def get_and_submit_flow_runs(self): ...
    async def run(self, flow_run, configuration, task_status=None): ...
    async def setup(self): ...
    async def teardown(self, *exc_info): ...
    async def start(self, run_once=False, with_healthcheck=False, printer=print): ...
    async def submit(self, flow, parameters=None, job_variables=None): ...
    async def sync_with_backend(self): ...
    async def __aenter__(self): ...
    async def __aexit__(self, *exc_info): ...

    # Of the 2.x generation
    async def check_for_cancelled_flow_runs(self): ...
    async def cancel_run(self, flow_run): ...
    async def kill_infrastructure(self, infrastructure_pid, configuration, grace_seconds=30): ...


class PrefectBaseJobConfiguration:
    """The public members of Prefect 3.8's BaseJobConfiguration."""

    @property
    def is_using_a_runner(self): ...
    @classmethod
    def json_template(cls): ...
    @classmethod
    async def from_template_and_values(cls, base_job_template, values, client=None): ...
    @classmethod
    async def resolve_for_flow_run(
        cls, flow_run, *, client, work_pool, worker_name, worker_id=None, deployment=None
    ): ...
    def prepare_for_flow_run(self, flow_run, deployment=None, flow=None, work_pool=None, worker_name=None): ...


class PrefectBaseVariables:
    """The public members of Prefect 3.8's BaseVariables."""

    @classmethod
    def model_json_schema(
        cls,
        by_alias=True,
        ref_template="#/definitions/{model}",
        schema_generator=GenerateJsonSchema,
        mode="validation",
    ): ...


MEMBERS = [
    pytest.param(ours, name, member, id=f"{ours}.{name}")
    for ours, theirs in {
        "BaseWorker": PrefectBaseWorker,
        "BaseJobConfiguration": PrefectBaseJobConfiguration,
        "BaseVariables": PrefectBaseVariables,
    }.items()
    for name, member in vars(theirs).items()
    if isinstance(member, property | classmethod | staticmethod) or callable(member)
]


def function(member: Any) -> Callable[..., Any]:
    return getattr(member, "__func__", None) or getattr(member, "fget", None) or member


@pytest.mark.parametrize(("owner", "name", "theirs"), MEMBERS)
def test_a_public_member_of_prefects_is_here_with_the_same_meaning(owner: str, name: str, theirs: Any) -> None:
    ours = inspect.getattr_static(getattr(procworker, owner), name)

    assert type(ours) is type(theirs)
    assert inspect.iscoroutinefunction(function(ours)) is inspect.iscoroutinefunction(function(theirs))
    mine = dict(inspect.signature(function(ours)).parameters)
    for parameter in inspect.signature(function(theirs)).parameters.values():
        same = mine.pop(parameter.name)
        assert (same.kind, same.default) == (parameter.kind, parameter.default), parameter.name
    optional = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert all(more.default is not more.empty or more.kind in optional for more in mine.values())


@pytest.mark.parametrize(("owner", "name", "theirs"), MEMBERS)
def test_positional_parameters_stand_in_prefects_order(owner: str, name: str, theirs: Any) -> None:
    ours = inspect.getattr_static(getattr(procworker, owner), name)
    signatures = [inspect.signature(function(member)).parameters for member in (theirs, ours)]
    wanted, found = ([p.name for p in s.values() if p.kind is not p.KEYWORD_ONLY] for s in signatures)
    assert found[: len(wanted)] == wanted


def test_class_attributes_of_workers_have_prefects_names() -> None:
    worker = procworker.ProcessWorker
    assert worker.type == "process"
    assert worker.job_configuration is procworker.ProcessJobConfiguration
    assert worker.job_configuration_variables is procworker.ProcessVariables
    assert all(
        isinstance(getattr(worker, f"_{what}"), str) for what in ("documentation_url", "logo_url", "description")
    )


def test_a_result_is_true_when_its_status_code_is_0() -> None:
    assert procworker.BaseWorkerResult(identifier="1", status_code=0)
    assert not procworker.ProcessWorkerResult(identifier="1", status_code=1)
