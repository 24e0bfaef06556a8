"""The commands: their flags, their signals and their exit codes, as a person at a terminal or a CI job meets them."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import pytest
from commands import FAST, ROOT, TEMPLATE, Command, code_of, fake_prefect, flow_file
from misbehave import survivors

import procworker
from procworker import BaseWorker, BaseWorkerResult, ProcessWorker
from procworker.cli import build_parser
from procworker.cli.common import SAME_SIGNAL_SECONDS
from procworker.cli.run import kind_of, parse_pairs
from procworker.system.processes import Process
from procworker.system.tree import Family
from procworker.testing import Beside, serving
from procworker.testing.rows import now

PREFECTS_FLAGS = {
    *("--name", "-n", "--pool", "-p", "--work-queue", "-q", "--type", "-t", "--limit", "-l"),
    *("--prefetch-seconds", "--run-once", "--with-healthcheck", "--install-policy", "--base-job-template"),
    *("--create-pool-if-not-found", "--no-create-pool-if-not-found"),
}
POLL, CREATE = "/get_scheduled_flow_runs", "/work_pools/?$"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    """A server with a pool whose runs are those of the mini engine; the settings of commands lead there."""
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a command of this test started has ended with it."""
    yield
    found = survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}")
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    assert not found


def commands() -> dict[str, argparse.ArgumentParser]:
    action = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


# Help, version, template, server


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--version") == 0
    assert capsys.readouterr().out == f"procworker {procworker.__version__}\n"


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_tells_every_option_and_what_it_is_for(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(name, "--help") == 0
    out = capsys.readouterr().out
    parser = commands()[name]
    for action in parser._actions:
        if action.help != argparse.SUPPRESS:
            assert all(option in out for option in action.option_strings)
            assert action.help or action.choices, f"{action.option_strings or action.dest} has no help"
    assert str(parser.description).splitlines()[0] in out


def test_help_of_the_program_tells_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name}  ", out, re.M) for name in commands())
    assert {"--version", "--profile"} <= options(build_parser())


def test_start_takes_every_flag_of_prefects() -> None:
    assert options(commands()["start"]) >= PREFECTS_FLAGS


def test_the_readme_tells_every_flag_of_start() -> None:
    text = (ROOT / "README.rst").read_text(encoding="utf-8")
    for action in commands()["start"]._actions:
        if action.help != argparse.SUPPRESS and action.dest != "help":
            assert action.option_strings[0].replace("--create", "--[no-]create") in text


def test_the_template_of_a_type_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("template") == 0
    assert json.loads(capsys.readouterr().out) == ProcessWorker.get_default_base_job_template()


@pytest.mark.parametrize("action", ["status", "stop"])
def test_no_embedded_server_is_no_error(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("server", action) == 0
    assert capsys.readouterr().out == "No embedded server is running.\n"
    assert code_of("server", action, "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_python_m_is_the_command(tmp_path: Path) -> None:
    with Command(tmp_path, "--version") as command:
        assert command.wait() == 0
    assert command.out == f"procworker {procworker.__version__}\n"
    assert command.err == ""


@pytest.mark.parametrize(("command", "expected"), [("procworker.cli.main(['template'])", False), ("None", True)])
def test_the_command_of_httpx_is_not_imported_with_ours(command: str, expected: bool) -> None:
    pytest.importorskip("rich")
    code = f"import sys, procworker.cli; {command}; import httpx; print('rich' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert answer.stdout.splitlines()[-1] == str(expected)


def test_a_reader_that_has_left_is_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "procworker", "template"]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=30)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# start: what the flags do


@pytest.fixture
def recorded() -> Iterator[list[BaseWorker]]:
    """The workers that the command makes of a type that somebody else offers."""
    made: list[BaseWorker] = []

    class RecordedWorker(BaseWorker):
        type = "recorded"

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> BaseWorkerResult:
            return BaseWorkerResult(identifier="0", status_code=0)

    yield made
    del BaseWorker._known["recorded"]


def test_every_flag_reaches_the_worker(server: Beside, recorded: list[BaseWorker], tmp_path: Path) -> None:
    file = tmp_path / "template.json"
    file.write_text(json.dumps(TEMPLATE))
    flags = (
        "-q red --work-queue blue -n tester -t recorded -l 3 --prefetch-seconds 120 --install-policy never --run-once"
    )
    code = code_of("start", "-p", "new", *flags.split(), "--base-job-template", str(file))

    (worker,) = recorded
    assert code == 0
    assert (worker._work_pool_name, worker.name, worker.limit) == ("new", "tester", 3)
    assert (worker._work_queues, worker._prefetch_seconds) == ({"red", "blue"}, 120)
    assert (server.pools["new"].type, server.pools["new"].base_job_template) == ("recorded", TEMPLATE)
    assert ("new", "tester") in server.workers
    poll = server.seen("POST", POLL)[0].json
    assert poll["work_queue_names"] == ["blue", "red"]
    assert poll["scheduled_before"] > (now() + timedelta(seconds=100)).isoformat()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs prctl")
def test_children_of_a_worker_of_another_type_are_not_taken_for_orphans(server: Beside) -> None:
    codes: list[int] = []

    class ParentWorker(BaseWorker):
        type = "parent"

        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> BaseWorkerResult:
            child = subprocess.Popen(["sh", "-c", "exit 7"], start_new_session=True)  # noqa: ASYNC220
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
            await anyio.sleep(0.3)
            codes.append(child.wait())
            return BaseWorkerResult(identifier="0", status_code=0)

    server.add_pool("other", type="parent")
    server.schedule(server.add_deployment(pool="other"), pool="other")
    try:
        code_of("start", "-p", "other", "--run-once")
    finally:
        del BaseWorker._known["parent"]
    assert codes == [7]


def test_without_flags_the_settings_decide(
    server: Beside, recorded: list[BaseWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_WORKER_PREFETCH_SECONDS", "70")
    assert code_of("start", "-p", "new", "-t", "recorded", "--run-once") == 0

    (worker,) = recorded
    assert worker.name.startswith("RecordedWorker ")
    assert (worker.limit, worker._work_queues, worker._prefetch_seconds) == (None, set(), 70)


@pytest.mark.parametrize(
    ("flags", "environ", "policy"),
    [
        ("", {}, "adopt"),
        ("--run-once", {}, "kill"),
        ("", {"CI": "true"}, "kill"),
        ("", {"PROCWORKER_RUN": "within another flow run"}, "kill"),
        ("", {"PROCWORKER_RUN": ""}, "adopt"),
        ("--orphans kill", {}, "kill"),
        ("--run-once --orphans adopt", {"CI": "true"}, "adopt"),
    ],
)
def test_what_becomes_of_runs_whose_worker_dies_hard_depends_on_where_it_works(
    server: Beside, monkeypatch: pytest.MonkeyPatch, flags: str, environ: dict[str, str], policy: str
) -> None:
    monkeypatch.delenv("CI", raising=False)
    seen: list[str] = []

    async def start(self: ProcessWorker, *args: Any, **options: Any) -> None:
        seen.append(self._orphans)

    monkeypatch.setattr(ProcessWorker, "start", start)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert code_of("start", "-p", "pool", *flags.split()) == 0
    assert seen == [policy]


@pytest.mark.parametrize("do", ["complete", "fail"])
def test_a_process_that_could_not_be_killed_is_exit_5(server: Beside, monkeypatch: pytest.MonkeyPatch, do: str) -> None:
    end = Family.end

    async def in_vain(self: Family, *args: Any, **options: Any) -> None:
        await end(self, *args, **options)
        self.survivors = {Process(2**22, 1.0)}

    monkeypatch.setattr(Family, "end", in_vain)
    run = server.schedule(server.add_deployment(), parameters={"do": do})

    assert code_of("start", "-p", "pool", "--run-once") == 5
    assert server.run(run).state.type == ("COMPLETED" if do == "complete" else "FAILED")


def test_a_profile_wins_over_the_environment(server: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(os.environ["PREFECT_HOME"], "profiles.toml").write_text(f'[profiles.mine]\nPREFECT_API_URL = "{server.url}"\n')
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert code_of("--profile", "mine", "start", "-p", "pool", "--run-once") == 0
    assert server.seen("POST", POLL)


def test_the_type_is_that_of_the_pool(
    server: Beside, recorded: list[BaseWorker], capsys: pytest.CaptureFixture[str]
) -> None:
    server.add_pool("other", type="recorded")
    assert code_of("start", "-p", "other", "--run-once") == 0
    assert len(recorded) == 1
    assert capsys.readouterr().out.splitlines() == [
        "Discovered type 'recorded' for work pool 'other'.",
        f"Worker {recorded[0].name!r} started!",
        f"Worker {recorded[0].name!r} stopped!",
        "0 flow runs.",
    ]


def test_a_missing_pool_is_created_for_processes(server: Beside) -> None:
    assert code_of("start", "-p", "new", "--run-once") == 0
    assert server.pools["new"].type == "process"
    assert server.pools["new"].base_job_template == ProcessWorker.get_default_base_job_template()


@pytest.mark.parametrize(
    ("paused", "flags", "says"),
    [
        ("pool", [], "work pool 'pool' is paused, resume it"),
        ("queue", [], "all work queues that it polls are paused, resume them: 'default'"),
        ("queue", ["-q", "default"], "all work queues that it polls are paused, resume them: 'default'"),
    ],
)
def test_what_is_paused_is_told(
    server: Beside, paused: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    thing = server.pools["pool"] if paused == "pool" else server.queue_in("pool")
    thing.is_paused = True
    assert code_of("start", "-p", "pool", "--run-once", *flags) == 0
    assert capsys.readouterr().err.count(says) == 1


def test_the_health_server_says_where_it_is(
    server: Beside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", "0")
    assert code_of("start", "-p", "pool", "--run-once", "--with-healthcheck") == 0
    assert re.search(r"^Health server: http://127.0.0.1:[1-9]\d+/health$", capsys.readouterr().out, re.M)


# start --run-once: an exit code for CI


def test_run_once_ends_with_0_when_everything_completed(server: Beside, capsys: pytest.CaptureFixture[str]) -> None:
    deployment = server.add_deployment()
    ids = [server.schedule(deployment, parameters={"print": [f"hello {n}"]}) for n in range(3)]
    later = server.schedule(deployment, due_in=3600)

    assert code_of("start", "-p", "pool", "--run-once") == 0
    assert [server.run(id).state.type for id in ids] == ["COMPLETED"] * 3
    assert server.run(later).state.type == "SCHEDULED"
    assert {f"run-{n + 1} | hello {n}" for n in range(3)} <= set(capsys.readouterr().out.splitlines())


def test_run_once_with_an_empty_queue_is_fine(server: Beside) -> None:
    assert code_of("start", "-p", "pool", "--run-once") == 0


@pytest.mark.parametrize(("do", "state"), [("fail", "FAILED"), ("raise", "CRASHED"), ("cancel", "CANCELLED")])
def test_run_once_ends_with_1_when_a_run_did_not_complete(server: Beside, do: str, state: str) -> None:
    deployment = server.add_deployment()
    good, bad = server.schedule(deployment), server.schedule(deployment, parameters={"do": do})

    assert code_of("start", "-p", "pool", "--run-once") == 1
    assert (server.run(good).state.type, server.run(bad).state.type) == ("COMPLETED", state)


def test_run_once_takes_no_more_than_its_limit(server: Beside) -> None:
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(3)]

    assert code_of("start", "-p", "pool", "--run-once", "--limit", "1") == 0
    assert sorted(server.run(id).state.type for id in ids) == ["COMPLETED", "SCHEDULED", "SCHEDULED"]


def test_run_once_waits_for_a_server_that_is_just_starting(server: Beside, tmp_path: Path) -> None:
    id = server.schedule(server.add_deployment())
    server.down()
    with Command(tmp_path, "start", "-p", "pool", "--run-once") as command:
        time.sleep(0.5)  # long enough for it to have asked in vain; were it not, the test would only prove less
        assert command.process.poll() is None
        server.up()
        assert command.wait() == 0
    assert server.run(id).state.type == "COMPLETED"


# start: signals


@pytest.fixture
def start(server: Beside, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start a worker named w1 on the pool, and wait until it polls."""
    started: list[Command] = []

    def begin(**options: Any) -> Command:
        command = Command(tmp_path / "worker", "start", "-p", "pool", "-n", "w1", **options)
        started.append(command.__enter__())
        server.wait_request("POST", POLL)
        return command

    yield begin
    for command in started:
        command.__exit__(*sys.exc_info())


def running(server: Beside, **parameters: Any) -> UUID:
    """A flow run that has begun."""
    id = server.schedule(server.add_deployment(), parameters=parameters)
    server.wait_state(id, "RUNNING")
    return id


def pause() -> None:
    """Let the time pass within which signals count once: what is tested here is that time itself."""
    time.sleep(SAME_SIGNAL_SECONDS + 0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_idle_worker_stops_at_once(server: Beside, start: Callable[..., Command], number: int) -> None:
    command = start()
    begun = time.monotonic()
    command.send(number)

    assert command.wait() == 0
    assert time.monotonic() - begun < 3
    assert command.out.endswith("Worker 'w1' stopped!\n")
    assert "Traceback" not in command.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_lets_running_flows_finish(server: Beside, start: Callable[..., Command], number: int) -> None:
    command = start()
    id = running(server, seconds=1)
    waiting = server.schedule(server.add_deployment(), due_in=3600)
    command.send(number)

    assert command.wait() == 0
    assert [state.type for state in server.run(id).states] == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]
    assert server.run(waiting).state.type == "SCHEDULED"


def test_signals_within_a_second_count_once(server: Beside, start: Callable[..., Command]) -> None:
    """Ctrl-C hits the whole group, and a supervisor may forward it as well."""
    command = start()
    id = running(server, seconds=1.5, term="die")
    command.send(signal.SIGINT, signal.SIGTERM, signal.SIGINT)

    assert command.wait() == 0
    assert server.run(id).state.type == "COMPLETED"


def test_the_second_signal_ends_the_runs_and_says_who_did(server: Beside, start: Callable[..., Command]) -> None:
    command = start()
    id = running(server, do="sleep", term="die", misbehave=["sleep"])
    command.send(signal.SIGTERM)
    pause()
    assert server.run(id).state.type == "RUNNING"
    command.send(signal.SIGTERM)

    state = server.wait_state(id, "CRASHED", timeout=8.5)  # the drain would take longer
    assert "'w1' was stopped" in state.message
    assert command.wait() == 0


def test_the_third_signal_kills_at_once(server: Beside, start: Callable[..., Command]) -> None:
    command = start()
    id = running(server, do="sleep", term="ignore")
    command.send(signal.SIGTERM)
    pause()
    command.send(signal.SIGTERM)
    pause()
    assert server.run(id).state.type == "RUNNING"
    command.send(signal.SIGTERM)

    assert command.wait(5) == 0
    assert server.run(id).state.type == "CRASHED"


def test_under_nohup_a_hangup_is_nothing(server: Beside, start: Callable[..., Command]) -> None:
    command = start(ignoring=(signal.SIGHUP,))
    command.send(signal.SIGHUP)
    server.wait_request("POST", POLL, count=len(server.seen("POST", POLL)) + 3)
    assert command.process.poll() is None
    command.send(signal.SIGTERM)

    assert command.wait() == 0


@pytest.mark.parametrize("broken", [{"status": 503}, {"body": "<html>"}, {"truncate": 9}, {"reset": True}])
def test_without_run_once_a_server_that_is_away_is_waited_for(server: Beside, tmp_path: Path, broken: Any) -> None:
    id = server.schedule(server.add_deployment())
    fault = server.fault("*", "", times=6, **broken)
    with Command(tmp_path, "start", "-p", "pool", PREFECT_WORKER_HEARTBEAT_SECONDS="0.2") as command:
        server.wait_state(id, "COMPLETED")
        command.send(signal.SIGTERM)
        assert command.wait() == 0
    assert fault.count == 6
    assert "Traceback" not in command.err


def test_a_worker_that_never_saw_its_server_stops_as_well(server: Beside, tmp_path: Path) -> None:
    server.down()
    with Command(tmp_path, "start", "-p", "pool") as command:
        command.until_it_says("started!")
        command.send(signal.SIGTERM)
        assert command.wait(5) == 0


# run: one flow, now


@pytest.fixture
def place(server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: flows.py with the flow `hello`, and a Prefect that is the mini engine."""
    path = tmp_path / "place"
    path.mkdir()
    flow_file(path / "flows.py")
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect")))
    monkeypatch.chdir(path)
    return path


def run(*argv: str, **parameters: Any) -> int:
    pairs = [word for name, value in parameters.items() for word in ("-p", f"{name}={json.dumps(value)}")]
    return code_of("run", *argv, *pairs)


def only_run(server: Beside) -> Any:
    (flow_run,) = server.runs.values()
    return flow_run


def test_a_flow_of_a_file_is_run_here_and_now(server: Beside, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("flows.py:hello", print=["Hello!"], err=["Oh."], env=["cwd", "PREFECT__FLOW_ENTRYPOINT"])

    out, err = capsys.readouterr()
    assert code == 0
    *lines, last = out.splitlines()
    told = ["Hello!", f"cwd={place}", f"PREFECT__FLOW_ENTRYPOINT={place / 'flows.py'}:hello"]
    assert lines == [f"run-1 | {line}" for line in told]
    assert re.fullmatch(r"Completed: flow run 'run-1' \(\d+\.\d s, \d+\.\d s CPU, .*exit 0, 0 left behind\)", last)
    assert err == "run-1 | Oh.\n"
    flow_run = only_run(server)
    assert server.flows[flow_run.flow_id].name == "say-hello"
    assert [state.type for state in flow_run.states] == ["PENDING", "RUNNING", "COMPLETED"]
    assert (flow_run.deployment_id, flow_run.work_pool_name) == (None, None)


def test_a_flow_of_a_module_is_found_by_the_flows_python(
    server: Beside, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("package.module:my_flow", env=["PREFECT__FLOW_ENTRYPOINT"]) == 0
    assert "run-1 | PREFECT__FLOW_ENTRYPOINT=package.module.my_flow" in capsys.readouterr().out
    assert server.flows[only_run(server).flow_id].name == "my-flow"


@pytest.mark.parametrize(
    ("do", "state", "exits", "says"),
    [
        ("fail", "FAILED", 0, "the flow failed"),
        ("cancel", "CANCELLED", 0, ""),
        ("exit", "CRASHED", 3, "Flow run infrastructure exited with"),
        ("nothing", "CRASHED", 0, "The flow run process ended without"),
    ],
)
def test_an_outcome_other_than_completed_is_exit_1(
    server: Beside, place: Path, do: str, state: str, exits: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("flows.py:hello", do=do) == 1
    assert only_run(server).state.type == state
    receipt, _, rest = capsys.readouterr().out.partition("\n")
    assert re.fullmatch(rf"{state.title()}: flow run 'run-1' \(.* s CPU, .*exit {exits}, 0 left behind\)", receipt)
    assert rest.startswith(says)


def test_parameters_arrive_with_their_types(server: Beside, place: Path) -> None:
    given = ["n=1", "f=1.5", "yes=true", "none=null", 'list=[1, "a"]', "text=a b=c", 'quoted="1"', "empty=", "nan=NaN"]
    flags = [word for pair in given for word in ("-p", pair)]
    assert code_of("run", "flows.py:hello", *flags) == 0
    texts = {"text": "a b=c", "quoted": "1", "empty": "", "nan": "NaN"}
    assert only_run(server).parameters == {"n": 1, "f": 1.5, "yes": True, "none": None, "list": [1, "a"], **texts}


def test_a_deployment_is_run_here_with_the_template_of_its_pool(server: Beside, place: Path) -> None:
    mark = place / "ran"
    server.add_deployment("nightly", flow="etl", parameters={"file": str(mark), "do": "fail"}, tags=["etl"])
    assert run("etl/nightly", do="complete") == 0

    flow_run = only_run(server)
    assert [state.type for state in flow_run.states] == ["PENDING", "RUNNING", "COMPLETED"]
    assert (flow_run.parameters, flow_run.tags) == ({"file": str(mark), "do": "complete"}, ["etl"])
    assert mark.read_text().count("\n") == 1


def test_a_flow_run_that_waits_is_claimed_and_run(server: Beside, place: Path) -> None:
    id = server.schedule(server.add_deployment())
    assert run(str(id)) == 0
    assert [state.type for state in server.run(id).states] == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]


def test_a_secret_of_the_settings_is_not_in_the_output(
    server: Beside, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "pnu_very_secret")
    assert run("flows.py:hello", print=["pnu_very_secret"]) == 0
    assert "very_secret" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_interrupting_cancels_the_run_and_tells_its_end(server: Beside, place: Path, number: int, code: int) -> None:
    with Command(place, "run", "flows.py:hello", "-p", "do=sleep") as command:
        id = next(iter(server.wait_for(lambda: dict(server.runs))))
        server.wait_state(id, "RUNNING")
        command.send(number)
        assert command.wait() == code
    assert server.run(id).state.type == "CANCELLED"
    assert command.out.startswith("Cancelled: flow run 'run-1'")
    assert "Traceback" not in command.err


def test_interrupting_twice_does_not_wait_for_a_flow_that_ignores_it(server: Beside, place: Path) -> None:
    with Command(place, "run", "flows.py:hello", "-p", "do=sleep", "-p", "term=ignore") as command:
        id = next(iter(server.wait_for(lambda: dict(server.runs))))
        server.wait_state(id, "RUNNING")
        command.send(signal.SIGINT)
        pause()
        assert command.process.poll() is None
        command.send(signal.SIGINT)
        assert command.wait(5) == 130
    assert server.run(id).state.type == "CANCELLED"


def test_interrupting_before_there_is_a_run_is_quiet(server: Beside, place: Path) -> None:
    silence = server.fault("GET", "/health", hang=True)
    with Command(place, "run", "flows.py:hello") as command:
        server.wait_request("GET", "/health")
        command.send(signal.SIGINT)
        assert command.wait(5) == 130
    server.call(silence.release)
    assert "Traceback" not in command.err


@pytest.mark.parametrize("held", ["POST /flows", "POST /flow_runs"])
def test_interrupting_while_the_run_is_made_is_not_forgotten(server: Beside, place: Path, held: str) -> None:
    method, path = held.split()
    fault = server.fault(method, f"{path}/?$", hang=True)
    with Command(place, "run", "flows.py:hello", "-p", "do=sleep") as command:
        server.wait_request(method, f"{path}/?$")
        command.send(signal.SIGINT)
        time.sleep(0.2)  # the signal is on its way
        server.call(fault.release)
        assert command.wait() == 130
    assert all(flow_run.state.type == "CANCELLED" for flow_run in server.runs.values())


# The pieces


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("flows.py:hello", "entrypoint"),
        ("etl/flows.py:hello", "entrypoint"),
        ("package.module:hello", "entrypoint"),
        ("etl/nightly", "deployment"),
        ("My flow/every night", "deployment"),
        ("6d7b2a34-4d1f-4b1c-9f4f-3a3a7b0e8f00", "flow run"),
        ("6d7b2a344d1f4b1c9f4f3a3a7b0e8f00", "flow run"),
    ],
)
def test_the_kind_of_a_target_is_seen_from_its_form(target: str, kind: str) -> None:
    assert kind_of(target) == kind


def test_what_is_not_json_is_a_text() -> None:
    given = ["a=01", "b={", "c=Infinity", "d=[NaN]", "e==", "f=é", "g=1e3", "h='x'"]
    expected = {"a": "01", "b": "{", "c": "Infinity", "d": ["NaN"], "e": "=", "f": "é", "g": 1000.0, "h": "'x'"}
    assert parse_pairs(given, "parameter") == expected
