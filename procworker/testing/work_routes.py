"""Work pools, flows, deployments, blocks and variables, as clients read and change them."""

from __future__ import annotations

import json
import re
from uuid import uuid4

from procworker.testing.messages import Request
from procworker.testing.model import Model
from procworker.testing.routing import Answer, Refused, body, find, fits, limit_of, route
from procworker.testing.rows import Row, now, parse_time

NEW_POOL = "description base_job_template is_paused concurrency_limit storage_configuration"


class WorkRoutes(Model):
    """What there is to run, and where."""

    # Work pools

    @route("POST", "/work_pools")
    def _create_pool(self, request: Request) -> Answer:
        given = body(request, f"type {NEW_POOL}", "name")
        if given["name"].lower().startswith("prefect"):
            raise Refused(403, "Worker pools starting with 'Prefect' are reserved for internal use.")
        if given["name"] in self.pools:
            raise Refused(409, "A work pool with this name already exists.")
        _check_template(given.get("base_job_template") or {})
        return 201, self.add_pool(**{"type": "prefect-agent", **given}).row()

    @route("GET", "/work_pools/{name}")
    def _read_pool(self, request: Request, name: str) -> Answer:
        row = find(self.pools, name, "Work pool").row()
        if self.old:
            del row["storage_configuration"]
        return 200, row

    @route("PATCH", "/work_pools/{name}")
    def _update_pool(self, request: Request, name: str) -> Answer:
        pool = find(self.pools, name, "Work pool")
        given = body(request, NEW_POOL)
        _check_template(given.get("base_job_template") or {})
        vars(pool).update(given)
        return 204, None

    @route("DELETE", "/work_pools/{name}")
    def _delete_pool(self, request: Request, name: str) -> Answer:
        find(self.pools, name, "Work pool")
        self.delete_pool(name)
        return 204, None

    @route("POST", "/work_pools/{name}/workers/heartbeat")
    def _heartbeat(self, request: Request, name: str) -> Answer:
        pool = find(self.pools, name, "Work pool")
        given = body(request, "heartbeat_interval_seconds return_id metadata", "name")
        interval = given.get("heartbeat_interval_seconds")
        if interval is not None and interval != int(interval) and not self.old:
            raise Refused(422, "heartbeat_interval_seconds: Input should be a valid integer")
        worker = self.workers.setdefault((name, given["name"]), {"id": uuid4(), "heartbeats": 0})
        worker.update(heartbeats=worker["heartbeats"] + 1, interval=interval, time=now())
        pool.status = "READY"
        return (200, worker["id"]) if self.cloud and given.get("return_id") else (204, None)

    @route("POST", "/work_pools/{name}/workers/filter")
    def _read_workers(self, request: Request, name: str) -> Answer:
        body(request, "workers limit offset")
        pool = find(self.pools, name, "Work pool")
        return 200, [
            {
                "id": row["id"],
                "name": worker,
                "work_pool_id": pool.id,
                "last_heartbeat_time": row["time"],
                "status": "ONLINE",
            }
            for (of_pool, worker), row in self.workers.items()
            if of_pool == name
        ]

    @route("POST", "/work_pools/{name}/queues/filter")
    def _read_queues(self, request: Request, name: str) -> Answer:
        given = body(request, "work_queues limit offset")
        rule = (given.get("work_queues") or {}).get("name")
        queues = self.queues_of(find(self.pools, name, "Work pool"))
        return 200, [queue.row() for queue in queues if fits(queue.name, rule)]

    @route("GET", "/work_queues/{id}")
    def _read_queue(self, request: Request, id: str) -> Answer:
        return 200, find(self.queues, id, "Work queue").row()

    @route("POST", "/work_pools/{name}/get_scheduled_flow_runs")
    def _poll(self, request: Request, name: str) -> Answer:
        given = body(request, "work_queue_names scheduled_before scheduled_after limit")
        pool = find(self.pools, name, "Work pool")
        queues = {queue.name: queue for queue in self.queues_of(pool)}
        wanted = [find(queues, queue, "Work queue") for queue in given.get("work_queue_names") or queues]
        before = given.get("scheduled_before") and parse_time(given["scheduled_before"])
        due = self.due(pool, wanted, before)[: limit_of(given)]
        return 200, [
            {"work_pool_id": pool.id, "work_queue_id": run.work_queue_id, "flow_run": run.row()} for run in due
        ]

    # Flows and deployments

    @route("POST", "/flows")
    def _create_flow(self, request: Request) -> Answer:
        given = body(request, "tags" if self.old else "tags labels", "name")
        known = any(flow.name == given["name"] for flow in self.flows.values())
        return 200 if known else 201, self.add_flow(given["name"], given.get("tags") or ()).row()

    @route("GET", "/flows/{id}")
    def _read_flow(self, request: Request, id: str) -> Answer:
        return 200, find(self.flows, id, "Flow").row()

    @route("GET", "/deployments/{id}")
    def _read_deployment(self, request: Request, id: str) -> Answer:
        row = find(self.deployments, id, "Deployment").row()
        if self.old:
            row["infra_overrides"] = row.pop("job_variables")
        return 200, row

    @route("GET", "/deployments/name/{flow}/{name}")
    def _read_deployment_by_name(self, request: Request, flow: str, name: str) -> Answer:
        named = {(self.flows[d.flow_id].name, d.name): d for d in self.deployments.values()}
        if (flow, name) not in named:
            raise Refused(404, f"Deployment {flow}/{name} not found")
        return self._read_deployment(request, str(named[flow, name].id))

    # Blocks and variables

    @route("GET", "/block_types/slug/{slug}/block_documents/name/{name}")
    def _read_block_by_name(self, request: Request, slug: str, name: str) -> Answer:
        named = {(block["block_type"]["slug"], block["name"]): block for block in self.blocks.values()}
        if (slug, name) not in named:
            raise Refused(404, "Block document not found")
        return self._read_block(request, str(named[slug, name]["id"]))

    @route("GET", "/block_documents/{id}")
    def _read_block(self, request: Request, id: str) -> Answer:
        block = find(self.blocks, id, "Block document")
        shown = request.query.get("include_secrets") == "true"
        return 200, block if shown else {**block, "data": dict.fromkeys(block["data"], "********")}

    @route("GET", "/variables/name/{name}")
    def _read_variable(self, request: Request, name: str) -> Answer:
        return 200, find(self.variables, name, "Variable")


def _check_template(template: Row) -> None:
    """Refuse a base job template that Prefect would refuse."""
    if not template:
        return
    if not (template.get("job_configuration") and template.get("variables")):
        raise Refused(422, "The `base_job_template` must contain both `job_configuration` and `variables`.")
    used = set(re.findall(r"{{\s*([^{}\s]+)\s*}}", json.dumps(template["job_configuration"])))
    if undeclared := used - set(template["variables"].get("properties", {})):
        raise Refused(422, f"undeclared variables in the job configuration: {sorted(undeclared)}")
