"""`procworker doctor`: every fault is found, named, and told what mends it; nothing is changed, no secret shown."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from commands import FAST, ROOT, code_of, fake_prefect

from procworker.cli.doctor import _of_server, check_host
from procworker.cli.doctor.check_python import Flows, embedded_server
from procworker.cli.doctor.check_server import Server, ask, clock, versions
from procworker.cli.doctor.findings import Finding, guarded
from procworker.settings import Settings
from procworker.system.journal import Journal
from procworker.testing import Beside, serving

HTML = {"status": 200, "body": "<html>", "headers": {"Content-Type": "text/html"}}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No CI around the test, a Prefect that is there at once, and a directory without files of settings."""
    for name in (
        *check_host.SERVICES,
        "container",
        "KUBERNETES_SERVICE_HOST",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(with_a_server(fake_prefect(tmp_path / "packages"))))
    monkeypatch.chdir(tmp_path)


def with_a_server(packages: Path) -> Path:
    """What a Prefect's server needs, as far as versions tell."""
    for name, version in {"fastapi": "0.138.0", "uvicorn": "0.30.0", "sqlalchemy": "2.0.40"}.items():
        information = packages / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return packages


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    with serving() as server:
        for name, value in {**FAST, "PREFECT_API_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        yield server


Findings = dict[str, list[tuple[str, str, str]]]


def examined(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Findings:
    """What is found, by what it is about."""
    assert code_of(*argv[:0], "doctor", *argv, "--json") == code
    captured = capsys.readouterr()
    assert captured.err == ""
    told = json.loads(captured.out)
    assert told["ok"] == (code == 0)
    found: Findings = {}
    for row in told["checks"]:
        assert row["fix"] or row["status"] == "ok", f"nothing mends this: {row}"
        found.setdefault(row["what"], []).append((row["status"], row["finding"], row["fix"]))
    return found


def of_server(pool: str | None = None, queue: str | None = None) -> Findings:
    """What is found of the server alone, which is quicker."""
    server = anyio.run(ask, Settings.load(), pool)
    found: Findings = {}
    for finding in _of_server(server, queue, Flows(prefect="3.8.8")):
        assert finding.fix or finding.status == "ok"
        found.setdefault(finding.what, []).append((finding.status, finding.text, finding.fix))
    return found


def one(found: Findings, what: str) -> tuple[str, str, str]:
    (only,) = found[what]
    return only


# All is well


def test_all_is_well_and_nothing_was_done(server: Beside, capsys: pytest.CaptureFixture[str]) -> None:
    server.add_pool("laptop", concurrency_limit=3)
    before = sorted(Path(os.environ["PROCWORKER_HOME"]).rglob("*"))
    found = examined(capsys, "--pool", "laptop", "--queue", "default")

    assert not [what for what, rows in found.items() for row in rows if row[0] != "ok"]
    assert re.fullmatch(rf"{server.url} answers in \d+ ms", one(found, "API")[1])
    assert one(found, "auth")[1] == "none needed"
    assert one(found, "versions")[1] == "server 3.8.8, flows 3.8.8"
    assert found["work pool 'laptop'"][0][1] == "type 'process', limit 3, not ready"
    assert one(found, "late runs")[1] == "none"
    assert one(found, "workers")[1] == "0 online"
    assert sorted(Path(os.environ["PROCWORKER_HOME"]).rglob("*")) == before
    for request in server.requests:
        assert request.method == "GET" or request.path.endswith("/filter"), f"{request.method} {request.path}"


def test_without_an_api_the_embedded_server_is_spoken_of(capsys: pytest.CaptureFixture[str]) -> None:
    found = examined(capsys)
    assert one(found, "API")[1].startswith("no PREFECT_API_URL: `run` and `start --local` use an embedded server")
    assert one(found, "embedded server")[0] == "ok"
    found = examined(capsys, "--pool", "laptop", code=1)
    assert one(found, "work pool 'laptop'") == ("FAIL", "only a server knows it", "set PREFECT_API_URL")


def test_for_people_it_is_a_line_for_each_and_the_remedy_below(
    server: Beside, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add_pool("laptop", is_paused=True)
    assert code_of("doctor", "--pool", "laptop") == 0
    lines = capsys.readouterr().out.splitlines()

    assert all(re.match(r"(ok|warn|FAIL) +\S.*: \S|      -> \S", line) for line in lines)
    place = lines.index("warn  work pool 'laptop': is paused: nothing runs")
    assert lines[place + 1] == "      -> prefect work-pool resume laptop"
    assert "\x1b" not in "".join(lines)


# Settings


def test_settings_are_told_with_their_places_and_without_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".env").write_text("PREFECT_API_KEY=canary-1\nnonsense\n")
    monkeypatch.setenv("PREFECT_API_ULR", "http://x")
    monkeypatch.setenv("PREFECT_PROFILE", "gone")
    rows = examined(capsys)["settings"]

    assert rows[0][1].startswith("profile 'ephemeral'; ")
    assert f"PREFECT_API_KEY ({tmp_path}/.env)" in rows[0][1]
    texts = [(status, text, fix) for status, text, fix in rows[1:]]
    assert (
        "warn",
        "PREFECT_API_ULR (environment) is no setting of Prefect's",
        "did you mean PREFECT_API_URL?",
    ) in texts
    assert any(f"{tmp_path}/.env, line 2: ignored" in text for _, text, _ in texts)
    assert any("profile 'gone' is not in" in text for _, text, _ in texts)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("PREFECT_API_URL", "127.0.0.1:4200", "did you mean 'http://127.0.0.1:4200/api'?"),
        ("PREFECT_WORKER_QUERY_SECONDS", "often", "PREFECT_WORKER_QUERY_SECONDS 'often' (environment)"),
    ],
)
def test_settings_that_cannot_be_used_hide_nothing_else(
    name: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    found = examined(capsys, code=1)
    assert one(found, "settings")[0] == "FAIL"
    assert text in one(found, "settings")[1]
    assert one(found, "python")[0] == one(found, "temporary directory")[0] == "ok"


# The server


@contextmanager
def listening(context: ssl.SSLContext | None = None, answer: bytes = b"") -> Iterator[int]:
    """A port where somebody says this to everybody (nothing: says nothing), perhaps in TLS."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                held.append(connection)
                if context:
                    connection = context.wrap_socket(connection, server_side=True)
                    held.append(connection)
                if answer:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()
            except ssl.SSLError:
                continue
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("url", "text", "fix"),
    [
        ("http://127.0.0.1:{port}/api", "nothing listens at 127.0.0.1:{port}", "start the server there"),
        ("http://no-such-host.invalid/api", "'no-such-host.invalid' is not known", "correct PREFECT_API_URL (environ"),
    ],
)
def test_a_server_that_is_not_there(url: str, text: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("PREFECT_API_URL", url.format(port=port))
    found = of_server("p")
    status, said, mend = one(found, "API")
    assert status == "FAIL"
    assert text.format(port=port) in said
    assert fix in mend
    assert not {"auth", "clock", "work pool 'p'"} & set(found)  # they would say the same again


def test_a_server_that_does_not_answer_takes_five_seconds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as port:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        began = time.monotonic()
        found = of_server("laptop")
        assert time.monotonic() - began < 7  # five, on a machine with other work
    assert "no answer within 4 s" in one(found, "API")[1]


@pytest.mark.parametrize(
    ("how", "text", "fix"),
    [
        ({"status": 503}, "503", "see its log"),
        ({"status": 401}, "401", "a proxy or gateway"),
        (HTML, "no Prefect server answers there (200)", "correct PREFECT_API_URL (environment)"),
        ({"status": 404, "body": "{}"}, "no Prefect server answers there (404)", "correct PREFECT_API_URL"),
        ({"reset": True}, "no HTTP is spoken there", "begins with https://"),
    ],
)
def test_something_else_answers(server: Beside, how: dict[str, Any], text: str, fix: str) -> None:
    server.fault("GET", "/health", times=9, **how)
    status, said, mend = one(of_server(), "API")
    assert status == "FAIL"
    assert text in said
    assert fix in mend


def test_a_url_without_api_is_told_from_any_other(server: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's server answers there with its UI."""
    bare = server.url.removesuffix("/api")
    monkeypatch.setenv("PREFECT_API_URL", bare)
    server.fault("GET", "^/health", times=1, **HTML)
    status, said, mend = one(of_server(), "API")
    assert (status, said) == ("FAIL", f"{bare} is no API")
    assert f"add /api: PREFECT_API_URL={server.url}" in mend


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(answer=b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n") as port:
        monkeypatch.setenv("PREFECT_API_URL", "https://prefect.invalid/api")
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:canary-2@127.0.0.1:{port}")
        status, said, mend = one(of_server(), "API")
    assert status == "FAIL"
    assert f"through proxy http://***@127.0.0.1:{port}: the proxy refuses" in said
    assert "NO_PROXY" in mend


def test_tls_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(answer=b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as port:
        monkeypatch.setenv("PREFECT_API_URL", f"https://127.0.0.1:{port}/api")
        _, said, mend = one(of_server(), "API")
    assert "no TLS is spoken there" in said
    assert "begins with http://" in mend


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with listening(context, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ntrue") as port:
        monkeypatch.setenv("PREFECT_API_URL", f"https://127.0.0.1:{port}/api")
        _, said, mend = one(of_server(), "API")
        assert "the server's certificate is not trusted (self" in said
        assert "PREFECT_API_SSL_CERT_FILE" in mend
        monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        status, said, _ = one(of_server(), "API")
        assert (status, f"trusting {tmp_path}/cert.pem" in said) == ("ok", True)
        monkeypatch.setenv("PREFECT_API_URL", f"https://localhost:{port}/api")
        _, said, mend = one(of_server(), "API")
        assert "is for another name than 'localhost'" in said
        monkeypatch.setenv("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "1")
        assert "certificates are NOT verified" in one(of_server(), "API")[1]


def test_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(auth_string="me:canary-3") as server:
        monkeypatch.setenv("PREFECT_API_URL", server.url)
        found = of_server("p")
        assert one(found, "auth")[1] == "the server wants credentials, and none are set"
        assert "work pool 'p'" not in found
        monkeypatch.setenv("PREFECT_API_KEY", "canary-4")
        assert one(of_server(), "auth")[1] == "the server refuses PREFECT_API_KEY (environment)"
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:canary-3")
        assert one(of_server(), "auth")[1] == "accepted, with PREFECT_API_AUTH_STRING (environment)"
        server.fault("GET", "/admin/version", times=1, status=403, body="{}")
        assert "forbids" in one(of_server(), "auth")[1]


def asked(server_version: str | None, auth_string: str | None = None) -> Server:
    settings = Settings(api_url="http://h/api", api_auth_string=auth_string)
    return Server(settings, answers={"version": server_version})


@pytest.mark.parametrize(
    ("theirs", "ours", "password", "status", "text"),
    [
        ("2.20.26", "2.20.26", False, "ok", "server 2.20.26, flows 2.20.26"),
        ("2.20.26", "3.8.8", False, "FAIL", "Prefect 3 refuses a server of 2.x"),
        ("3.8.8", "2.20.26", False, "ok", ""),
        ("3.8.8", "2.20.26", True, "FAIL", "before 3.1.10 knows no passwords"),
        ("3.8.8", "3.0.11", True, "FAIL", "before 3.1.10 knows no passwords"),
        ("3.8.8", "3.4.25", True, "warn", "no task runs will be shown"),
        ("3.8.8", "3.4.25", False, "ok", ""),
        ("3.4.25", "3.6.27", False, "warn", "no task runs will be shown"),
        ("3.0.11", "3.4.25", False, "ok", ""),
        ("3.6.27", "3.8.8", True, "ok", ""),
        (None, "3.8.8", True, "ok", "keeps its version to itself"),
    ],
)
def test_versions_that_do_not_get_on(theirs: str | None, ours: str, password: bool, status: str, text: str) -> None:
    """As the README says in its table."""
    (finding,) = versions(asked(theirs, "me:word" if password else None), ours)
    assert finding.status == status
    assert text in finding.text


@pytest.mark.parametrize(
    ("seconds", "status", "text"),
    [
        (0.0, "ok", "that of the server"),
        (-4.0, "ok", "that of the server"),
        (9.0, "warn", "9 s ahead of the server's: runs are taken too early"),
        (-9.0, "warn", "9 s behind the server's: runs are taken too late"),
        (-7200.0, "warn", "2 hours behind"),
        (None, "ok", "does not tell its time"),
    ],
)
def test_a_clock_that_is_wrong(seconds: float | None, status: str, text: str) -> None:
    server = asked("3.8.8")
    server.ahead_seconds = seconds
    (finding,) = clock(server)
    assert finding.status == status
    assert text in finding.text


@pytest.mark.parametrize(("times", "status"), [(1, "ok"), (2, "warn")])
def test_a_busy_server_may_show_an_old_time_once(server: Beside, times: int, status: str) -> None:
    old = format_datetime(datetime.now(timezone.utc) - timedelta(minutes=3), usegmt=True)
    server.fault("GET", "/health", times=1, headers={"Date": old})
    new = old if times == 2 else format_datetime(datetime.now(timezone.utc), usegmt=True)
    server.fault("GET", "/health", times=9, headers={"Date": new})
    assert one(of_server(), "clock")[0] == status


# The work pool


def arranged(server: Beside, **pool: Any) -> None:
    server.add_pool("laptop", queues=("default", "gpu"), **pool)


@pytest.mark.parametrize(
    ("pool", "argv", "status", "text", "fix"),
    [
        ({"is_paused": True}, ("laptop",), "warn", "is paused", "prefect work-pool resume laptop"),
        ({"concurrency_limit": 0}, ("laptop",), "warn", "limit of 0", "clear-concurrency-limit laptop"),
        ({"type": "docker"}, ("laptop",), "FAIL", "here are workers for ", "choose another --pool"),
        ({"type": "ecs:push"}, ("laptop",), "FAIL", "which no worker serves", "choose another --pool"),
        ({"base_job_template": {"variables": {}}}, ("laptop",), "FAIL", "'job_configuration'", "procworker template"),
        ({}, ("laptop", "cpu"), "FAIL", "has no queue 'cpu'", "its queues are: default, gpu"),
        ({}, ("desktop",), "warn", "does not exist", "is the name right?"),
    ],
)
def test_a_pool_in_which_nothing_runs(
    server: Beside, pool: dict[str, Any], argv: tuple[str, ...], status: str, text: str, fix: str
) -> None:
    arranged(server, **pool)
    found = of_server(*argv)
    rows = next(rows for what, rows in found.items() if what.startswith("work pool"))
    assert any(row[0] == status and text in row[1] and fix in row[2] for row in rows), rows


def test_paused_queues_late_runs_and_other_workers(server: Beside) -> None:
    arranged(server)
    server.add_queue("laptop", "night", is_paused=True)
    for queue in ("gpu", "gpu", "default"):
        server.set_state(server.schedule(pool="laptop", queue=queue), "SCHEDULED", "Late")
    server.schedule(pool="laptop")
    server.workers["laptop", "w1"] = {"id": uuid4(), "heartbeats": 1, "time": datetime.now(timezone.utc)}
    found = of_server("laptop")

    assert any("nothing comes from the queue 'night'" in text for _, text, _ in found["work pool 'laptop'"])
    assert one(found, "late runs")[:2] == ("warn", "2 in queue 'gpu', 1 in queue 'default'")
    assert re.fullmatch(r"1 online: 'w1' \(\d s ago\)", one(found, "workers")[1])
    found = of_server("laptop", "night")
    assert "queue 'night' has none" in one(found, "late runs")[2]


def test_a_server_that_answers_half_of_it(server: Beside) -> None:
    arranged(server)
    server.fault("POST", "/workers/filter", times=9, status=404, body="{}")
    server.fault("POST", "/flow_runs/filter", times=9, **HTML)
    server.fault("GET", "/admin/version", times=9, status=503)
    found = of_server("laptop")
    assert found["work pool 'laptop'"][0][0] == "ok"
    assert not {"workers", "late runs", "versions"} & set(found)
    assert one(found, "auth")[0] == "warn"


def test_a_queue_needs_its_pool(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("doctor", "--queue", "q") == 2
    assert "name that by --pool" in capsys.readouterr().err


# The Python of the flows


def test_a_python_without_prefect_or_with_a_broken_one(
    server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text, fix = one(examined(capsys, "--python", "/nowhere", code=1), "python")
    assert (status, text) == ("FAIL", "python '/nowhere' does not exist or is not executable")
    broken = fake_prefect(tmp_path / "broken", "raise ImportError('no such thing')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    status, text, fix = one(examined(capsys, code=1), "python")
    assert (status, "cannot be imported: ImportError: no such thing" in text) == ("FAIL", True)
    assert "--force-reinstall prefect==3.8.8" in fix


def test_a_prefect_in_the_current_directory_is_suspicious(
    server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(fake_prefect(tmp_path / "project"))
    status, text, fix = one(examined(capsys), "python")
    assert (status, "from the current directory" in text) == ("warn", True)
    assert "prefect/__init__.py meant?" in fix


@pytest.mark.parametrize(
    ("prefect", "packages", "status", "text"),
    [
        ("3.8.8", {}, "ok", "nothing known is in its way"),
        ("3.8.8", {"fastapi": "0.140.1"}, "FAIL", "known not to work with fastapi 0.140.1"),
        ("3.6.27", {"fastapi": "0.139.0"}, "FAIL", "known not to work with fastapi 0.139.0"),
        ("2.20.26", {"fastapi": "0.139.0"}, "ok", ""),
        ("3.8.8", {"sqlalchemy": "2.1.0b1"}, "FAIL", "sqlalchemy 2.1.0b1"),
        ("3.0.11", {"pydantic": "2.11.3"}, "FAIL", "pydantic 2.11.3"),
        ("3.8.8", {"uvicorn": None}, "FAIL", "there is no uvicorn"),
    ],
)
def test_packages_with_which_the_embedded_server_does_not_start(
    prefect: str, packages: dict[str, str | None], status: str, text: str
) -> None:
    good = {"fastapi": "0.138.0", "sqlalchemy": "2.0.40", "pydantic": "2.10.0", "uvicorn": "0.30.0"}
    flows = Flows("/py", prefect, good | packages)
    (needed,), (spare,) = embedded_server(flows, True), embedded_server(flows, False)
    assert needed.status == status
    assert text in needed.text
    assert spare.status == ("warn" if status == "FAIL" else status)


# This host


def test_a_state_directory_that_cannot_be_used(
    server: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROCWORKER_HOME", str(tmp_path / "file" / "home"))
    status, text, fix = one(examined(capsys), "state directory")
    assert (status, "cannot be written" in text, "PROCWORKER_HOME" in fix) == ("warn", True, True)
    (alone,) = check_host.state_directory(tmp_path / "file" / "home", True)
    assert alone.status == "FAIL"
    (tmp_path / "open").mkdir(mode=0o700)
    (tmp_path / "open").chmod(0o777)
    (shared,) = check_host.state_directory(tmp_path / "open", False)
    assert (shared.status, shared.text) == ("warn", f"{tmp_path / 'open'} can be written by others")


@pytest.mark.parametrize(("free", "status"), [(10 << 20, "FAIL"), (100 << 20, "warn"), (1 << 40, "ok")])
def test_a_disk_that_is_full(free: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=free))
    (finding,) = check_host.temporary_directory()
    assert finding.status == status


def test_a_temporary_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere/at/all")
    (finding,) = check_host.temporary_directory()
    assert (finding.status, "TMPDIR" in finding.fix) == ("FAIL", True)


def test_what_dead_workers_left_is_counted_and_left_alone(tmp_path: Path) -> None:
    living, dead = Journal(tmp_path), Journal(tmp_path)
    living.page(uuid4(), pool="laptop", phase="running")
    for pool, phase in (("laptop", "running"), ("laptop", "ended"), (None, "running"), ("laptop", "running")):
        dead.page(uuid4(), pool=pool, phase=phase)
    (found,) = check_host.left_behind(tmp_path)
    assert found.text == "nothing of theirs waits"
    dead.close()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (found,) = check_host.left_behind(tmp_path)

    text = "they left 1 run of no pool, 2 runs of work pool 'laptop', 1 undelivered report of work pool 'laptop'"
    assert (found.status, found.text) == ("warn", text)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert len(Journal(tmp_path).take_over("", "laptop")) == 0  # of another API
    living.close()


def test_containers_and_ci(tmp_path: Path) -> None:
    def text(finding: list[Finding]) -> str:
        (only,) = finding
        assert only.status == "ok"
        return only.text

    assert text(check_host.container({}, tmp_path)) == "none seen"
    (tmp_path / ".dockerenv").touch()
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "comm").write_text("tini\n")
    assert text(check_host.container({}, tmp_path)) == "Docker; PID 1 is 'tini'"
    assert text(check_host.container({"container": "podman"}, tmp_path / "none")) == "podman"
    assert text(check_host.automation({})) == "none seen"
    assert text(check_host.automation({"CI": "1", "GITHUB_ACTIONS": "1"})).startswith("GitHub Actions; `start` ends")
    assert "--orphans" not in text(check_host.automation({"TOX_ENV_DIR": "/x"}))


def test_few_open_files(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))\n"
        "from procworker.cli.doctor.check_host import open_files\n"
        "print(open_files()[0].status, open_files()[0].text)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "warn 256, and up to 512 where that is needed\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is about Linux")
def test_what_the_kernel_offers(tmp_path: Path) -> None:
    (finding,) = check_host.kernel(tmp_path)
    assert ("subreaper" in finding.text, "inotify" in finding.text) == (True, True)


# All together


def test_a_check_that_breaks_hides_no_other() -> None:
    def check(number: int) -> list[Finding]:
        raise ZeroDivisionError(number)

    (finding,) = guarded("sum", check, 7)
    assert (finding.status, finding.what, finding.text) == ("FAIL", "sum", "this check broke: ZeroDivisionError: 7")


def test_no_secret_is_shown(
    server: Beside, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arranged(server)
    url = server.url.replace("http://", "http://canary-user:canary-password@")
    for name, value in {
        "PREFECT_API_URL": url,
        "PREFECT_API_KEY": "canary-key",
        "PREFECT_API_AUTH_STRING": "canary-admin:canary-word",
        "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Token": "canary-header"}',
        "MY_SECRET": "canary-of-mine",
    }.items():
        monkeypatch.setenv(name, value)
    server.fault("GET", "/work_pools/", times=9, status=400, body='{"detail": "canary-key and canary-of-mine"}')
    faults: list[Callable[[], Any]] = [
        lambda: None,
        lambda: server.fault("GET", "/health", times=9, status=500, body="canary-word"),
        lambda: server.down(),
    ]
    for spoil in faults:
        spoil()
        code_of("doctor", "--pool", "laptop")
        code_of("doctor", "--pool", "laptop", "--json")
        out, err = capsys.readouterr()
        assert "canary" not in (out + err).replace("canary-admin", "")
        assert "API" in out


# Typical mistakes with `start`: one line that names what to change


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-p", "docker"], "install the package that offers it, or choose another pool"),
        (["-p", "docker", "-t", "process"], "choose another pool, or another worker type with --type"),
        (["-p", "none", "--no-create-pool-if-not-found"], "create it, or leave out --no-create-pool-if-not-found"),
        (["-p", "pool", "--python", "/bin/ls"], "name a Python, a virtual environment or a tox environment directory"),
        (
            ["-p", "pool", "--python", "/bin/echo"],
            "name a Python, a virtual environment or a tox environment directory",
        ),
        (["-p", "pool", "--python", "/nowhere"], "python '/nowhere' does not exist"),
        (["-p", "pool", "--with-healthcheck"], "choose another address with PREFECT_WORKER_WEBSERVER_HOST and"),
        (["-p", "pool", "--base-job-template", "/nowhere"], "--base-job-template '/nowhere' cannot be read: No such"),
        (["-p", "pool", "--base-job-template", "bad.json"], "--base-job-template 'bad.json' is not JSON"),
    ],
)
def test_a_mistake_with_start_is_one_line_that_names_the_remedy(
    server: Beside, argv: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "bad.json").write_text("{nope")
    server.add_pool("docker", type="docker")
    server.add_pool("pool")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("PREFECT_WORKER_WEBSERVER_PORT", str(taken.getsockname()[1]))
        assert code_of("start", *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:{port}/api", "check PREFECT_API_URL (most end in /api) and the server: "),
        ("http://127.0.0.1:{port}/api", "(PREFECT_API_URL is http://127.0.0.1:{port}/api)"),
        ("http://no-such-host.invalid/api", "(PREFECT_API_URL is http://no-such-host.invalid/api)"),
    ],
)
def test_a_server_that_is_not_there_is_named(
    url: str, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setenv("PREFECT_API_URL", url.format(port=port))
    assert code_of("start", "-p", "pool", "--run-once", "--startup-timeout", "0") == 3
    assert text.format(port=port) in capsys.readouterr().err


def test_start_on_the_ui_hints_at_api(
    server: Beside, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", server.url.removesuffix("/api"))
    server.fault("*", "", times=99, **HTML)
    assert code_of("start", "-p", "pool", "--run-once", "--startup-timeout", "0") == 3
    assert "(most PREFECT_API_URL end in /api)" in capsys.readouterr().err


def test_a_profile_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--profile", "gone", "start", "-p", "pool") == 2
    assert "choose one of: cloud, default, ephemeral" in capsys.readouterr().err
