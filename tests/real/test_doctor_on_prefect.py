"""`procworker doctor` and `preview` on a real server, and doctor's start of the embedded one."""

from __future__ import annotations

import json
import os

import pytest
from commands import code_of
from harness import Prefect

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_doctor_on_a_real_server(
    prefect38: Prefect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads what there is, leaves no trace, and has the embedded server start and end."""
    api = prefect38.api
    api("POST", "/work_pools/", json={"name": "seen", "type": "process"})
    api("POST", "/work_pools/seen/workers/heartbeat", json={"name": "w1"})
    before = api("POST", "/work_pools/seen/queues/filter", json={})
    monkeypatch.setenv("PREFECT_API_URL", api.url)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", str(api.auth_string))
    code = code_of("doctor", "--pool", "seen", "--python", prefect38.python, "--json")
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)["checks"]}

    version = api("GET", "/admin/version")
    assert code == 0
    assert found["auth"]["finding"] == "accepted, with PREFECT_API_AUTH_STRING (environment)"
    assert found["clock"]["finding"].startswith("that of the server")
    assert found["versions"]["finding"] == f"server {version}, flows {version}"
    assert found["work pool 'seen'"]["finding"] == "queue default"
    assert found["workers"]["finding"].startswith("1 online: 'w1'")
    assert found["late runs"]["finding"] == "none"
    assert api("POST", "/work_pools/seen/queues/filter", json={}) == before
    monkeypatch.setenv("PREFECT_API_URL", api.url.removesuffix("/api"))
    assert code_of("doctor") == 1
    assert f"add /api: PREFECT_API_URL={api.url}" in capsys.readouterr().out


def test_doctor_starts_the_embedded_server(prefect38: Prefect, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("doctor", "--python", prefect38.python, "--server") == 0
    assert "was ready on a new database after " in capsys.readouterr().out
    assert not os.listdir(os.environ["TMPDIR"])
