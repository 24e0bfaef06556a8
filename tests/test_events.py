"""Events have the form that automations compare."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from test_http import settings

from procworker.server import events
from procworker.server.client import Client
from procworker.server.models import Deployment, Flow, FlowRun, WorkPool
from procworker.testing.api import PrefectApi

DEPLOYMENT = Deployment(id=uuid4(), name="d", tags=["b", "x"])
FLOW = Flow(id=uuid4(), name="f", tags=["a"])
FLOW_RUN = FlowRun(id=uuid4(), name="r", tags=["b", "c"])
POOL = WorkPool(id=uuid4(), name="p")
OBJECTS: dict[str, Any] = {"deployment": DEPLOYMENT, "flow": FLOW, "flow-run": FLOW_RUN}


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("ProcessWorker 7f-A", "processworker-7f-a"),
        ("  Jürgen's  Büro_2 ", "jurgen-s-buro-2"),
        ("☃", ""),
    ],
)
def test_a_name_is_spelled_as_prefect_does(name: str, slug: str) -> None:
    assert events.slug(name) == slug


def test_the_worker_is_the_resource() -> None:
    resource = events.worker_resource("process", "My Worker")
    assert resource["prefect.resource.id"] == "prefect.worker.process.my-worker"
    assert resource["prefect.resource.name"] == "My Worker"
    assert resource["prefect.worker-type"] == "process"
    assert resource["prefect.version"]


def test_related_are_deployment_flow_run_then_all_tags_then_the_pool() -> None:
    labels = events.related(OBJECTS, POOL)
    assert [label["prefect.resource.role"] for label in labels] == [
        *("deployment", "flow", "flow-run"),
        *("tag", "tag", "tag", "tag"),
        "work-pool",
    ]
    assert labels[0] == {
        "prefect.resource.id": f"prefect.deployment.{DEPLOYMENT.id}",
        "prefect.resource.role": "deployment",
        "prefect.resource.name": "d",
    }
    assert [label["prefect.resource.id"] for label in labels[3:7]] == [f"prefect.tag.{tag}" for tag in "abcx"]
    assert "prefect.resource.name" not in labels[3]


def test_what_is_absent_is_not_related() -> None:
    assert events.related({"deployment": None, "flow": None}) == []


def test_the_flow_run_tells_where_it_ran_and_how_it_ended() -> None:
    run = events.related(OBJECTS, POOL, "host:17", 0)[2]
    assert run["prefect.infrastructure.identifier"] == "host:17"
    assert run["prefect.infrastructure.status-code"] == "0"
    assert not any("infrastructure" in key for key in events.related(OBJECTS, POOL)[2])
    assert events.related({}, POOL, "17", 0)[0]["prefect.resource.role"] == "work-pool"


def test_a_deployment_tells_its_version_as_far_as_the_server_does() -> None:
    told = {
        "branch": "main",
        "base": "b1",
        "root": None,
        "version_id": "v1",
        "version_info": {"type": "git", "version": "abc"},
    }
    deployment = Deployment.model_validate({"id": uuid4(), "name": "d", **told})
    label = events.related({"deployment": deployment})[0]
    assert {
        key.removeprefix("prefect.deployment."): value for key, value in label.items() if "resource" not in key
    } == {
        "branch": "main",
        "base": "prefect.deployment.b1",
        "version-id": "v1",
        "version-type": "git",
        "version": "abc",
    }


def test_there_are_never_more_related_resources_than_a_server_takes() -> None:
    many = FlowRun(id=uuid4(), tags=[f"{number:04}" for number in range(500)])
    labels = events.related({**OBJECTS, "flow-run": many}, POOL)
    assert len(labels) <= 100
    assert labels[-1]["prefect.resource.role"] == "work-pool"


def test_an_event_follows_only_what_was_minutes_ago() -> None:
    resource = events.worker_resource("process", "w")
    first = events.event("prefect.worker.started", resource)
    second = events.event("prefect.worker.stopped", resource, [], first)
    assert first["follows"] is None
    assert second["follows"] == first["id"]
    assert UUID(first["id"]) != UUID(second["id"])
    long_ago = (datetime.now(timezone.utc) - timedelta(minutes=5)).isoformat()
    assert events.event("e", resource, [], {**first, "occurred": long_ago})["follows"] is None


async def test_the_server_takes_an_event(server: PrefectApi) -> None:
    event = events.event("e", events.worker_resource("process", "w"), events.related(OBJECTS, POOL))
    async with Client(settings(server.url)) as client:
        await client.create_events([event])
    assert server.events == [event]
