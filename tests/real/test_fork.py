"""A run that is forked from a warm interpreter is what a spawned one is: nothing that a flow can see tells them apart.

The flows of fork_flows.py tell all they see. One worker serves all runs, stage by stage, for what a run leaves in its
zygote only a later one finds. A run that was not really forked is an error.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import HERE, Api, Place, Prefect, Worker, eventually, working
from misbehave import survivors

from procworker.process import ProcessWorker
from procworker.system.interpreter import find_interpreter
from procworker.system.warm import Warm

pytestmark = [pytest.mark.real, pytest.mark.long]

FULL = bool(os.environ.get("PROCWORKER_TEST_FULL"))
REPETITIONS = 20 if FULL else 2
METHODS = ("spawn", "fork")

WORK = {
    "gather": [[0, 1, 2, 3, 4], 10, "120\n", 0],
    "threads": [0, 1, 2, 3],
    "thread pool": [0, 1, 4, 9],
    "process pool": [1, 2],
    "multiprocessing fork": [1, 2, 3],
    "multiprocessing spawn": [1, 2, 3],
    "subprocess": "120\n",
    "fork": 5,
    "signal": [10],
    "subflow": 7,
    "tasks": [0, 2, 4],
    "stdin of a child": "",
}
"""What the work of a flow comes to, but for that of SSL, whose words are those of a version of OpenSSL."""

HARMLESS = re.compile(
    # Addresses; what is made of sets of texts, whose order is that of their hashes; names for one process alone.
    r"_?ctypes:|tokenize:|pydantic\.v1\.env_settings:env_file_sentinel|pydantic\._internal\._known_annotated_metadata:|opentelemetry\.\S+_KEY$"
    r"|threading:_main_thread\._ident|prefect\._internal\.control_listener:_owner_thread_id|runpy:"
)
"""State of modules that all forks of a zygote may have in common."""

SPOKEN = ("print", "stderr", "write", "echo", "run log", "atexit", "puts")

FIELDS = [
    *(
        "argv",
        "orig_argv",
        "executable",
        "path",
        "flags",
        "options",
        "pycache",
        "hooks",
        "tracing",
        "limits",
        "finders",
    ),
    *("module_name", "main", "main_spec", "main_loader", "engine_module", "gc", "warnings", "decimal", "locale"),
    *("asyncio", "contextvars", "<stdin>", "<stdout>", "<stderr>", "stdin_target", "stdin_read", "signals", "mask"),
    *("timers", "session", "umask", "nice", "cpus", "rlimits", "user", "no_children", "status", "cgroup", "oom", "cwd"),
    *("pwd_is_real", "threads", "count", "main_thread", "multiprocessing", "original_dir", "tempdir", "clock"),
    *("loggers", "levels", "disabled", "environ", "children_see", "settings", "dirt"),
]
"""What must be equal in a spawned and a forked run."""


@dataclass(frozen=True, eq=False)
class Case:
    """What is run: a function in fork_flows.py, or in another file, with its parameters and job variables."""

    title: str
    flow: str
    parameters: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ran:
    """One run, and all that became of it."""

    title: str
    method: str
    name: str
    id: str
    api: Api
    place: Place
    log: str = ""

    @cached_property
    def marks(self) -> dict[str, Any]:
        return self.place.marked(self.id)

    @cached_property
    def told(self) -> dict[str, Any]:
        """What the flow reports, but for what only tells who it is."""
        assert "report" in self.marks, str(self)
        return dict(self.plain(json.loads(self.marks["report"])))

    @cached_property
    def states(self) -> list[str]:
        states = self.api.states(self.id)
        found = [self.plain(f"{state['type']} {state['name']}: {state['message']}") for state in states]
        return [state for state in found if not state.startswith("SCHEDULED Late")]

    @property
    def code(self) -> int:
        found = re.search(rf"Flow run {self.name!r} exited with status code (-?\d+)", self.log)
        assert found, self.log
        return int(found.group(1))

    @property
    def output(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith(f"{self.name} | ")]

    @property
    def said(self) -> list[str]:
        """Its output without times, and without what depends on them; of tracebacks without the way there."""
        noise = re.compile(r"NAME \|   |NAME \| <frozen runpy>|.*EventsWorker")
        lines = (re.sub(r"\d\d:\d\d:\d\d\.\d+", "TIME", self.plain(line)) for line in self.output)
        return sorted(line for line in lines if not noise.match(line))

    @property
    def levels(self) -> str:
        """What it said at which level, on the server."""
        return ", ".join(line["message"] for line in self.api.logs(self.id) if "said at" in line["message"])

    @property
    def warm(self) -> list[bool] | None:
        """Whether it was forked, as far as it has told."""
        if "report" in self.marks:
            report = json.loads(self.marks["report"])
            found = report[2] if isinstance(report, list) else report["warm"]
        else:
            found = json.loads(self.marks.get("warm", "null"))
        return found

    def plain(self, what: Any) -> Any:
        """Without what no two runs have in common by their nature."""
        if isinstance(what, dict):
            return {self.plain(name): self.plain(value) for name, value in what.items() if not OWN_VARIABLE.match(name)}
        if isinstance(what, list):
            return [self.plain(value) for value in what]
        if isinstance(what, str):
            what = what.replace(self.id, "RUN").replace(self.name, "NAME")
            return re.sub(r"/procworker-[\w.-]+", "/WORK_DIR", what)
        return what

    def __str__(self) -> str:
        return "\n".join([f"{self.name}:", *self.states, *self.output])


OWN_VARIABLE = re.compile("PROCWORKER_RUN|PREFECT__CONTROL_|PREFECT__DEPLOYMENT_")


@dataclass
class Stage:
    """One worker, and the runs that it has served so far."""

    prefect: Prefect
    place: Place
    pool: str
    worker: Worker
    ran: dict[tuple[str, str], list[Ran]] = field(default_factory=dict)
    deployments: dict[tuple[str, str], str] = field(default_factory=dict)

    def deploy(self, flow: str, method: str) -> str:
        """Deploy a flow once, without a step that changes the directory."""
        if (flow, method) not in self.deployments:
            api, function = self.prefect.api, flow.rpartition(":")[2]
            where = flow if ".py:" in flow else f"{HERE / 'fork_flows.py'}:{flow}"
            body = {"name": f"{method} {uuid4().hex[:8]}", "entrypoint": where, "path": ".", "pull_steps": None}
            if flow in ("look", "surroundings"):  # without a step, the engine would add to sys.path
                body["pull_steps"] = [{"builtins.dict": {}}]
            body |= {"flow_id": api("POST", "/flows/", {"name": function})["id"], "work_pool_name": self.pool}
            body |= {"job_variables": {"start_method": method}, "enforce_parameter_schema": False}
            self.deployments[flow, method] = str(api("POST", "/deployments/", body)["id"])
        return self.deployments[flow, method]

    def play(self, *cases: tuple[Case, str]) -> None:
        """Have these run, all at once, and wait until nothing is left of them."""
        api, runs, pool = self.prefect.api, [], f"/work_pools/{self.pool}"
        # A SQLite server that has engines to serve would take long for this.
        api("PATCH", pool, {"is_paused": True})
        for case, method in cases:
            deployment = self.deploy(case.flow, method)
            had = self.ran.setdefault((case.title, method), [])
            name = f"{case.title}-{method}-{len(had)}".replace(" ", "-")
            body = {"name": name, "parameters": case.parameters, "state": {"type": "SCHEDULED"}}
            body |= {"job_variables": case.variables} if case.variables else {}
            run = str(api("POST", f"/deployments/{deployment}/create_flow_run", body)["id"])
            had.append(Ran(case.title, method, name, run, api, self.place))
            runs.append(run)
        api("PATCH", pool, {"is_paused": False})
        api.until_final(*runs)
        directory = self.place.path / "state" / "runs"
        eventually(lambda: not any(directory.iterdir()) or not self.worker.alive, what="no run has a directory")
        assert self.worker.alive

    def __getitem__(self, key: tuple[str, str]) -> list[Ran]:
        return self.ran[key]

    @property
    def runs(self) -> list[Ran]:
        return [run for runs in self.ran.values() for run in runs]


def forked(*cases: Case) -> list[tuple[Case, str]]:
    return [(case, "fork") for case in cases]


def spawned(*cases: Case) -> list[tuple[Case, str]]:
    return [(case, "spawn") for case in cases]


def write(place: Path, **files: str) -> Path:
    """Write files, whose names have __ for a dot and for nothing else."""
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (place / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return place


LOOK = Case("look", "look")
ENDINGS = [
    Case("threads and atexit", "end_well"),
    Case("async", "end_async"),
    Case("raises", "end_with", {"kind": "raise"}),
    Case("KeyboardInterrupt", "end_with", {"kind": "interrupt"}),
    Case("sys.exit 3", "end_with", {"kind": "exit", "value": 3}),
    Case("os._exit 7", "end_with", {"kind": "os._exit", "value": 7}),
    *(Case(f"signal {number}", "end_with", {"kind": "signal", "value": number}) for number in (2, 9, 15)),
]
SURVIVES = ("threads and atexit", "async", "raises", "sys.exit 3")
"""Endings after which there is still an interpreter to exit from."""
FILES = {
    "import_error": "import no_such_module",
    "import_exits": "import sys; sys.exit(4)",
    "import_interrupted": "raise KeyboardInterrupt",
}
"""Files of which no flow can be had."""

GUARDED = """
import sys
sys.path.append({here!r})
from flows import mark
from fork_flows import tell, warm
from prefect import flow
VERSION = {version}

@flow
def main():
    tell("report", [VERSION, __name__, warm()])

if __name__ == "__main__":
    mark("guarded", "ran")
    main()
"""
LOGGING = """
version: 1
disable_existing_loggers: false
loggers: {{"prefect": {{"level": "{level}"}}}}
"""
SITE = "import builtins, os; builtins.SITE = os.environ.get('GIVEN')"


def around(title: str, *modules: str, values: tuple[str, ...] = (), **variables: Any) -> Case:
    return Case(title, "surroundings", {"modules": list(modules), "values": list(values)}, variables)


ROOT = str(HERE.parents[1])
"""Where the package is that the worker is started from."""


class Surroundings:
    """Directories that flows are run in, and what is run there."""

    def __init__(self, place: Path) -> None:
        one, two = place / "one", place / "two"
        for directory in (one, two):
            write(directory, helper__py=f"WHO = {directory.name!r}")
            write(directory / "lib", relative__py=f"WHO = {directory.name!r}")
        (place / "link").symlink_to(one)
        (place / "temporary").mkdir()
        write(place / "site", sitecustomize__py=SITE)
        write(place / "shadow", graphviz__py="WHO = 'mine'")
        write(place / "files", **{f"{name}__py": text for name, text in FILES.items()})
        self.place = place
        self.write_version(1)

        self.broken = [Case(name.replace("_", " "), f"{place / 'files' / name}.py:main") for name in FILES]
        far = {"TMPDIR": str(place / "temporary"), "GIVEN": "ä ☃ \n"}
        self.plain = [
            around("one", "helper", working_dir=str(one)),
            around("two", "helper", working_dir=str(two)),
            around("link", "helper", working_dir=str(place / "link"), env=far),
        ]
        self.versioned = [
            around("settings", working_dir=str(place / "settings")),
            around("logging file", env={"PREFECT_LOGGING_SETTINGS_PATH": str(place / "logging" / "logging.yml")}),
            Case("edited", f"{place / 'edited' / 'guarded.py'}:main"),
        ]
        # A module of one's own that is named like one that Prefect requires, but its engine does not import.
        self.shadow = around("shadow", "graphviz", working_dir=str(place / "shadow"))
        self.relative = [
            around(f"relative {each.name}", "relative", working_dir=str(each), env={"PYTHONPATH": f"lib:{ROOT}"})
            for each in (one, two)
        ]
        path = {"PYTHONPATH": f"{place / 'site'}:{ROOT}"}
        self.site = [
            around(f"site {given}", values=("builtins:SITE",), working_dir=str(one), env={**path, "GIVEN": given})
            for given in ("first", "second")
        ]
        self.settings = [
            around("level DEBUG", env={"PREFECT_LOGGING_LEVEL": "DEBUG"}),
            around("level WARNING", env={"PREFECT_LOGGING_LEVEL": "WARNING"}),
            around("small letters", env={"prefect_logging_level": "DEBUG"}),
            # These act while what Prefect requires is imported.
            around(
                "libraries",
                values=("fsspec.config:conf", "websockets.http11:USER_AGENT"),
                env={"FSSPEC_FILE_AUTO_MKDIR": "given", "WEBSOCKETS_USER_AGENT": "given"},
            ),
        ]
        ascii = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}
        odd = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": None, "PYTHONDEVMODE": "1", "PYTHONPATH": f"{ROOT}:/no/where"}
        self.pythons = [
            around("python", env=odd),
            around("no language", env={"LANG": None, "LC_ALL": None, "LC_CTYPE": None}),
            around("ascii", env={**ascii, "GIVEN": "ä"}),
        ]

    def write_version(self, version: int) -> None:
        """Write what is edited between two stages."""
        write(
            self.place / "settings",
            prefect__toml=f"[api]\nrequest_timeout = {version}00.0\n",
            pyproject__toml=f"[tool.prefect.client]\nmax_retries = {version}\n",
            __env=f"PREFECT_LOGGING_EXTRA_LOGGERS=extra{version}\n",
        )
        write(self.place / "logging", logging__yml=LOGGING.format(level=("DEBUG", "ERROR")[version - 1]))
        write(self.place / "edited", guarded__py=GUARDED.format(version=version, here=str(HERE)))


@contextmanager
def opened(prefect: Prefect, place: Place) -> Iterator[Stage]:
    """A stage; afterwards all its runs know what the worker printed."""
    pool = prefect.api.pool(f"fork {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
    options = ("--pool", pool, "--limit", "8", "--python", prefect.python)
    environment = {"LANG": "C.UTF-8", "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2"}
    with working(place, prefect.api, *options, **environment) as worker:
        stage = Stage(prefect, place, pool, worker)
        yield stage
        assert worker.stop() == 0
        for run in stage.runs:
            run.log = worker.log


@pytest.fixture(scope="module")
def stage38(prefect38: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """Everything, with Prefect 3.8: in no stage more kinds of zygotes than there may be at a time."""
    place = Place(tmp_path_factory.mktemp("fork38"))
    here = Surroundings(place.path / "around")
    with opened(prefect38, place) as stage:
        stage.play(*forked(LOOK, *here.versioned, here.shadow), *spawned(LOOK, here.plain[-1]))
        here.write_version(2)
        second = [*here.versioned, *ENDINGS, *here.broken]
        stage.play(*forked(here.shadow, *here.plain, *second), *spawned(LOOK, *second))
        if FULL:
            stage.play(*(forked(*ENDINGS, *here.broken) * (REPETITIONS - 1)))
        stage.play(*(forked(LOOK, here.shadow) * REPETITIONS), *forked(*here.pythons), *spawned(*here.pythons))
        settings = [case for case in here.settings if case.title != "level WARNING"]
        stage.play(*forked(*here.settings), *spawned(*settings))
        stage.play(*forked(*here.relative, *here.site), *spawned(here.relative[0], here.site[0]))
    return stage


@pytest.fixture(scope="module")
def stage220(prefect220: Prefect, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A sample, with Prefect 2.20."""
    with opened(prefect220, Place(tmp_path_factory.mktemp("fork220"))) as stage:
        stage.play(*forked(LOOK), *spawned(LOOK, *ENDINGS))
        stage.play(*forked(LOOK, *ENDINGS), *spawned(LOOK))
    return stage


@pytest.fixture
def stage(version: str, request: pytest.FixtureRequest) -> Stage:
    found: Stage = request.getfixturevalue(f"stage{version}")
    return found


EVERY = ["38", "220"] if FULL else ["38"]
each_version = pytest.mark.parametrize("version", EVERY)
newest = pytest.mark.parametrize("version", ["38"])


@each_version
def test_every_run_is_started_as_it_should_be(stage: Stage) -> None:
    """Else all that follows would compare spawned runs with spawned runs."""
    seen = {run.name: run.warm for run in stage.runs if run.warm is not None}
    assert len(seen) > len(ENDINGS) * 2
    assert {name: warm for name, warm in seen.items() if warm != [("fork" in name)] * 2} == {}, stage.runs[0].log[
        -5000:
    ]
    assert "spawned instead" not in stage.runs[0].log


@each_version
@pytest.mark.parametrize("name", FIELDS)
def test_a_flow_sees_the_same(stage: Stage, name: str) -> None:
    spawned, again = (run.told[name] for run in stage["look", "spawn"])
    assert spawned == again, "not even two spawned runs see the same"
    for run in stage["look", "fork"]:
        assert run.told[name] == spawned, run.name


@each_version
def test_no_module_is_missing(stage: Stage) -> None:
    spawned = set(stage["look", "spawn"][0].told["modules"])
    for run in stage["look", "fork"]:
        # With `-m`, Python starts in this one, which no flow needs.
        assert spawned - set(run.told["modules"]) - {"runpy"} == set()


@each_version
def test_nothing_is_shared_that_is_for_one_process_alone(stage: Stage) -> None:
    runs = stage["look", "spawn"] + stage["look", "fork"]
    for name in runs[0].told["own"]:
        counts = Counter(json.dumps(run.told["own"][name]) for run in runs)
        assert [value for value, count in counts.items() if count > 1] == [], name


@each_version
def test_no_state_of_a_module_is_that_of_the_zygote(stage: Stage) -> None:
    """What differs between two spawned runs is of one process; what all spawned runs have, forks have, too."""
    spawned, again = (run.told["state"] for run in stage["look", "spawn"])
    first, *others = (run.told["state"] for run in stage["look", "fork"])
    names = [name for name in spawned if name in again and not HARMLESS.match(name)]
    shared = {}
    for name in names:
        expected = {spawned[name], again[name]}
        found = {run.get(name) for run in (first, *others)}
        if (len(expected) > 1 and len(found) == 1) or (len(expected) == 1 and found != expected):
            shared[name] = [*expected, *found]
    assert shared == {}


@each_version
def test_no_file_of_another_process_is_open(stage: Stage) -> None:
    runs = stage["look", "fork"]
    special = {run.name: [handle for handle in run.told["handles"].values() if handle[0][0] != "/"] for run in runs}
    memory = {run.name: [handle for handle in run.told["handles"].values() if "memfd:" in handle[0]] for run in runs}
    shared = Counter()
    for run in runs:
        # This one is for the names of its modules, and closed in all other forks.
        assert len(memory[run.name]) == 1
        own = {identity for what, identity in special[run.name] + memory[run.name] if what != "anon_inode"}
        shared.update(own)
        assert own & set(run.told["parents_handles"]) <= {identity for _, identity in memory[run.name]}
    assert [identity for identity, count in shared.items() if count > 1] == []
    expected = {what for run in stage["look", "spawn"] for what, _ in run.told["handles"].values() if what[0] != "/"}
    assert {what for handles in special.values() for what, _ in handles} <= expected


@each_version
def test_whatever_a_flow_does_works(stage: Stage) -> None:
    work = {}
    for run in stage["look", "spawn"] + stage["look", "fork"]:
        work[run.name] = json.loads(run.marks["work"])
        assert {name: work[run.name][name] for name in WORK} == WORK, run.name
    assert len({json.dumps(done["ssl"]) for done in work.values()}) == 1
    for method in METHODS:
        assert json.loads(stage["async", method][0].marks["work"]) == WORK["gather"]


@each_version
def test_what_a_run_prints_is_its_own(stage: Stage) -> None:
    lines = stage.runs[0].log.splitlines()
    for run in stage["look", "spawn"] + stage["look", "fork"]:
        for way in SPOKEN:
            said = [line for line in lines if re.search(rf"(\| | - ){way} {run.id}", line)]
            assert len(said) == 1, (run.name, way, said)
            assert said[0].startswith(f"{run.name} | ")


@each_version
@pytest.mark.parametrize("title", [case.title for case in ENDINGS])
def test_a_run_ends_the_same(stage: Stage, title: str) -> None:
    for run in stage[title, "fork"]:
        assert_same_end(stage[title, "spawn"][0], run)
        assert run.said == stage[title, "spawn"][0].said


@newest
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_as_broken(stage: Stage, name: str) -> None:
    title = name.replace("_", " ")
    for run in stage[title, "fork"]:
        assert_same_end(stage[title, "spawn"][0], run)


def assert_same_end(spawned: Ran, forked: Ran) -> None:
    assert forked.states == spawned.states, str(forked)
    assert forked.code == spawned.code
    for name in ("atexit", "thread"):
        assert forked.marks.get(name) == spawned.marks.get(name), name


@each_version
def test_functions_at_exit_run_and_threads_are_waited_for(stage: Stage) -> None:
    for method in METHODS:
        assert stage["threads and atexit", method][0].marks["thread"] == "joined"
        for title in SURVIVES:
            assert stage[title, method][0].marks["atexit"] == "ran", title


KNOWN = ("orig_argv", "<stdin>", "engine_module")
"""What has a test of its own: when there is a difference, it is one of all runs."""


def assert_same(stage: Stage, title: str) -> dict[str, Any]:
    """The last forked run tells what the spawned tells; return that."""
    spawned, forked = stage[title, "spawn"][0], stage[title, "fork"][-1]
    different = {name: (told, forked.told[name]) for name, told in spawned.told.items() if forked.told[name] != told}
    assert different.keys() <= {"warm", *KNOWN}, different
    assert forked.levels == spawned.levels
    return spawned.told


@newest
def test_an_engine_module_is_there_as_in_a_spawned_run(stage: Stage) -> None:
    """Also in forks of a zygote that has learnt what to import before it came up."""
    titles = {run.title for run in stage.runs if "engine_module" in run.marks.get("report", "")}
    there = {run.name: run.told["engine_module"] for run in stage.runs if run.title in titles - {"ascii"}}
    assert len(there) > 20
    assert {name for name, is_there in there.items() if not is_there} == set()


@newest
def test_each_directory_has_its_own_modules(stage: Stage) -> None:
    assert_same(stage, "link")
    for title, who in (("one", "one"), ("two", "two"), ("link", "one")):
        told = stage[title, "fork"][0].told
        assert told["helper"] == who
        assert told["cwd"] in told["path"]
    assert stage["link", "fork"][0].told["given"] == "ä ☃ \n"
    assert Path(stage["link", "fork"][0].told["tempdir"]).name == "temporary"


@newest
def test_settings_files_in_the_directory_are_honoured_when_they_change_too(stage: Stage) -> None:
    assert_same(stage, "settings")
    for version, run in enumerate(stage["settings", "fork"], start=1):
        settings = run.told["settings"]
        assert settings["PREFECT_API_REQUEST_TIMEOUT"] == f"{version}00.0"
        assert settings["PREFECT_CLIENT_MAX_RETRIES"] == str(version)
        assert settings["PREFECT_LOGGING_EXTRA_LOGGERS"] == f"extra{version}"


@newest
def test_a_logging_file_is_honoured_when_it_changes_too(stage: Stage) -> None:
    assert_same(stage, "logging file")
    assert [run.told["loggers"]["prefect"][0] for run in stage["logging file", "fork"]] == [10, 40]


@newest
def test_code_that_was_edited_runs_and_a_guarded_block_does_not(stage: Stage) -> None:
    expected = json.loads(stage["edited", "spawn"][0].marks["report"])
    first, second = (json.loads(run.marks["report"]) for run in stage["edited", "fork"])
    assert [first[0], second[0], expected[0]] == [1, 2, 2]
    assert first[1] == second[1] == expected[1] != "__main__"
    assert all("guarded" not in run.marks for run in stage["edited", "fork"])


@newest
def test_a_module_of_ones_own_wins_over_one_that_prefect_requires(stage: Stage) -> None:
    assert len(stage["shadow", "fork"]) > 2
    assert {run.name: run.told["graphviz"] for run in stage["shadow", "fork"] if run.told["graphviz"] != "mine"} == {}


@newest
def test_a_setting_of_one_run_is_in_effect_in_it(stage: Stage) -> None:
    assert_same(stage, "level DEBUG")
    for level, said in (("DEBUG", "said at debug, said at info, said at warning"), ("WARNING", "said at warning")):
        run = stage[f"level {level}", "fork"][0]
        assert run.told["settings"]["PREFECT_LOGGING_LEVEL"] == level
        assert run.levels == said


@newest
def test_a_setting_in_small_letters_is_one(stage: Stage) -> None:
    assert_same(stage, "small letters")
    assert "said at debug" in stage["small letters", "fork"][0].levels


@newest
def test_a_variable_of_a_library_that_prefect_imports_is_in_effect(stage: Stage) -> None:
    told = assert_same(stage, "libraries")
    assert told["websockets.http11:USER_AGENT"] == "given"
    assert told["fsspec.config:conf"]["file"]["auto_mkdir"] == "given"


@newest
def test_a_relative_path_is_one_of_the_directory_of_the_run(stage: Stage) -> None:
    assert_same(stage, "relative one")
    assert [stage[f"relative {who}", "fork"][0].told["relative"] for who in ("one", "two")] == ["one", "two"]


@newest
def test_a_sitecustomize_sees_the_variables_of_the_run(stage: Stage) -> None:
    assert assert_same(stage, "site first")["builtins:SITE"] == "first"
    assert stage["site second", "fork"][0].told["builtins:SITE"] == "second"


@newest
@pytest.mark.parametrize("title", ["python", "no language", "ascii"])
def test_an_odd_python_makes_no_difference(stage: Stage, title: str) -> None:
    assert_same(stage, title)


@each_version
def test_the_worker_never_stumbled(stage: Stage) -> None:
    names = tuple(f"{run.name} | " for run in stage.runs)
    own = [line for line in stage.runs[0].log.splitlines() if not line.startswith(names)]
    assert not [line for line in own if "Unexpected" in line or "unhandled" in line]
    assert stage.place.clear() == {}


@pytest.mark.anyio
async def test_nothing_is_started_twice_when_a_zygote_is_retired_that_is_about_to_fork(
    prefect38: Prefect, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is what a run of one kind too many does to it in this moment, and what is done when it is slow to answer."""
    interpreter = find_interpreter(prefect38.python, {})
    cookie, out, err = str(uuid4()), place.path / "out", place.path / "err"
    env = place.environment(prefect38.api, PREFECT__FLOW_RUN_ID="none", PROCWORKER_RUN=cookie)
    send = socket.send_fds
    async with Warm(place.path / "state") as warm:
        start = await warm.starter(interpreter, place.path, env)
        (zygote,) = warm._zygotes.values()

        def send_and_retire(*what: Any) -> int:
            sent = send(*what)
            zygote.retire("another kind is wanted")
            return sent

        monkeypatch.setattr(socket, "send_fds", send_and_retire)
        argv = [prefect38.python, "-m", "prefect.engine"]
        child = await start(argv, cwd=place.path, env=env, stdout=out, stderr=err)
        assert await child.wait() in (1, None)
    eventually(lambda: not survivors(f"PROCWORKER_RUN={cookie}"), what="all engines have ended")
    assert err.read_text().count("Invalid flow run id") == 1
