"""Secrets of every origin are planted, and nothing that procworker prints, stores or sends holds one."""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import FAST, TEMPLATE, Command

from procworker.testing import serving

CANARY = {
    "key": "canary-of-the-api-key",
    "header": "canary-of-a-header",
    "settings": "canary-of-another-setting",
    "environment": "canary-of-the-environment",
    "job": "canary-of-a-job-variable",
    "block": "canary-of-a-secret-block",
    "field": "canary-of-a-field",
}
SHOW = ["PREFECT_API_KEY", "DB_PASSWORD", "MY_TOKEN", "INNOCENT", "PLACE"]
"""Variables that the flow prints."""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["complete", "exit", "missing"])
def test_no_canary_is_seen_anywhere(tmp_path: Path, ending: str) -> None:
    place = tmp_path / "place"
    with serving() as server:
        template = json.loads(json.dumps(TEMPLATE))
        template["job_configuration"]["env"] = {
            "INNOCENT": "{{ prefect.blocks.secret.mine }}",
            "PLACE": "file://{{ prefect.blocks.store.mine.pin }}/x",
        }
        if ending == "missing":  # the reason is told, without the path's secret part
            template["variables"]["properties"]["command"]["default"] = f"/no/such/{CANARY['job']}"
        server.add_pool("pool", base_job_template=template)
        server.add_block("mine", "secret", {"value": CANARY["block"]})
        id = server.add_block("mine", "store", {"pin": CANARY["field"], "host": "visible"})
        server.blocks[id]["block_schema"] = {"fields": {"secret_fields": ["pin"]}}
        deployment = server.add_deployment(pool="pool", job_variables={"env": {"MY_TOKEN": CANARY["job"]}})
        # In the middle of this the output of a run is parted into lines.
        endless = "-" * (64 * 1024 - 8) + CANARY["block"] + "-" * (64 * 1024)
        parameters = {"do": ending, "code": 3, "env": SHOW, "print": [*CANARY.values(), endless]}
        run = server.schedule(deployment, parameters=parameters)
        environ = {
            **FAST,
            "PREFECT_API_URL": server.url,
            "PREFECT_API_KEY": CANARY["key"],
            "PREFECT_CLIENT_CUSTOM_HEADERS": json.dumps({"X-Secret": CANARY["header"]}),
            "PREFECT_SERVER_API_AUTH_STRING": f"user:{CANARY['settings']}",
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "DB_PASSWORD": CANARY["environment"],
        }
        argv, stored = [], []
        with Command(place, "start", "-p", "pool", "--run-once", **environ) as worker:
            while worker.process.poll() is None:
                argv.append(" ".join(arguments_below(worker.process.pid)))
                with suppress(OSError):  # what is removed meanwhile
                    stored += [read(record) for record in Path(os.environ["PROCWORKER_HOME"]).rglob("run.json")]
            assert worker.wait() == (0 if ending == "complete" else 1), worker.out + worker.err
        states = [repr(state) for state in server.run(run).states]
        # What the flow itself has told is not ours.
        sent = [json.dumps([*server.logs, *server.events], default=str), *states]
    seen = {
        "stdout": worker.out,
        "stderr": worker.err,
        "argv": "\n".join(argv if ending != "missing" else []),
        "disk": "\n".join(stored),
        "server": "\n".join(sent),
    }
    assert ending == "missing" or "***" in worker.out, "the flow has printed them"
    assert stored or ending == "missing", "the record was looked at"
    for where, text in seen.items():
        for name, secret in CANARY.items():
            assert secret not in text, f"the {name} stands in {where}"
    assert base64.b64encode(f"user:{CANARY['settings']}".encode()).decode() not in str(seen)


def arguments_below(pid: int) -> list[str]:
    found = []
    for process in (
        [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)] if psutil.pid_exists(pid) else []
    ):
        try:
            found += process.cmdline()
        except psutil.Error:
            continue
    return found


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
