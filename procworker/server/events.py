"""Events that tell what a worker does, in the form that automations compare."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

from procworker import __version__
from procworker.server.models import WorkPool

Labels = dict[str, str]

FOLLOWS_WITHIN = timedelta(minutes=5)
MOST_TAGS = 90  # an event with more than 100 related resources is refused


def slug(name: str) -> str:
    """Spell a name as resource ids do: lower-case ASCII words joined by hyphens."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def worker_resource(type: str, name: str) -> Labels:
    """Name the worker that an event is about."""
    return {
        "prefect.resource.id": f"prefect.worker.{type}.{slug(name)}",
        "prefect.resource.name": name,
        "prefect.version": f"procworker {__version__}",
        "prefect.worker-type": type,
    }


def related(
    objects: Mapping[str, Any],
    work_pool: WorkPool | None = None,
    identifier: str | None = None,
    status_code: int | None = None,
) -> list[Labels]:
    """Label deployment, flow and run (and where it ran) as far as present, then their tags, then the pool."""
    present = {kind: thing for kind, thing in objects.items() if thing is not None}
    labels = {kind: _labels(kind, thing) for kind, thing in present.items()}
    if "flow-run" in labels:
        infrastructure = {"identifier": identifier, "status-code": status_code}
        labels["flow-run"] |= _given("prefect.infrastructure", infrastructure)
    tags = sorted({tag for thing in present.values() for tag in thing.tags})[:MOST_TAGS]
    tagged = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags]
    return [*labels.values(), *tagged, *([_labels("work-pool", work_pool)] if work_pool else [])]


def related_to(run: Any, work_pool: WorkPool | None) -> list[Labels]:
    """Label what a run of ours (or None) belongs to, and where it ran."""
    if run is None:
        return related({}, work_pool)
    objects = {"deployment": run.deployment, "flow": run.flow, "flow-run": run.flow_run}
    known = (run.result.identifier, run.result.status_code) if run.result is not None else (None, None)
    return related(objects, work_pool, *known)


def event(
    name: str, resource: Labels, related: Sequence[Labels] = (), follows: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Say that something happens now; what it follows is told only if that was minutes ago at most."""
    now = datetime.now(timezone.utc)
    recent = follows and now - datetime.fromisoformat(follows["occurred"]) < FOLLOWS_WITHIN
    return {
        "id": str(uuid4()),
        "occurred": now.isoformat(),
        "event": name,
        "resource": resource,
        "related": list(related),
        "payload": {},
        "follows": follows["id"] if follows and recent else None,
    }


def _labels(kind: str, thing: Any) -> Labels:
    """Label one object; a deployment also tells its version, as far as the server does."""
    labels = {
        "prefect.resource.id": f"prefect.{kind}.{thing.id}",
        "prefect.resource.role": kind,
        "prefect.resource.name": thing.name,
    }
    if kind == "deployment":
        said = thing.model_extra or {}
        info = said.get("version_info") or {}
        origins = {name: said.get(name) and f"prefect.deployment.{said[name]}" for name in ("base", "root")}
        version = {"version-id": said.get("version_id"), "version-type": info.get("type")}
        version["version"] = info.get("version")
        labels |= _given("prefect.deployment", {"branch": said.get("branch"), **origins, **version})
    return labels


def _given(prefix: str, values: Mapping[str, object]) -> Labels:
    return {f"{prefix}.{name}": str(value) for name, value in values.items() if value is not None}
