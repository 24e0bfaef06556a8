"""A small in-memory Prefect server, served over real HTTP.

async with PrefectApi.running() as api:
    run_id = api.schedule(parameters={"name": "World"})
    ...                                          # something talks to api.url
    await api.wait_state(run_id, "COMPLETED")
"""

from __future__ import annotations

import base64
import json
import re
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from procworker.testing.http import ScriptedServer
from procworker.testing.messages import Reply, Request
from procworker.testing.routing import ROUTES, Answer, Refused, route
from procworker.testing.rows import State, now
from procworker.testing.run_routes import RunRoutes
from procworker.testing.task_routes import TaskRoutes
from procworker.testing.wire import Connection, switching
from procworker.testing.work_routes import WorkRoutes

JSON = "application/json"
SOCKETS = ("/events/in", "/events/out")
"""Where WebSockets lead."""


class PrefectApi(ScriptedServer, WorkRoutes, RunRoutes, TaskRoutes):
    """The server: verbs to arrange and to ask, then the routes that clients use."""

    base = "/api"

    def __init__(
        self,
        version: str = "3.8.8",
        *,
        csrf: bool = False,
        api_key: str | None = None,
        auth_string: str | None = None,
        cloud: bool = False,
    ) -> None:
        ScriptedServer.__init__(self)
        TaskRoutes.__init__(self, version, cloud)
        self.csrf = csrf
        self.api_key, self.auth_string = api_key, auth_string
        self.csrf_tokens: dict[str, str] = {}

    async def wait_state(self, id: UUID, *wanted: str, timeout: float = 20) -> State:
        """Wait until the current state has one of these types or names, and return it."""

        def reached() -> State | None:
            state = self.runs[id].state if id in self.runs else None
            return state if state and {state.type, state.name} & set(wanted) else None

        state = await self.wait_for(reached, timeout, f"flow run {id} in {' or '.join(wanted)}")
        assert state is not None
        return state

    def dump(self) -> str:
        """Every run with its history, then the latest requests."""
        lines = ["flow runs:"]
        for run in self.runs.values():
            history = [f"{s.name} ({s.message})" if s.message else s.name for s in run.states]
            lines.append(f"  {run.id} {run.name}: {', '.join(history)}")
        return "\n".join([*lines, "requests:", super().dump()])

    def answer(self, request: Request) -> Reply:
        try:
            if request.path in SOCKETS and request.headers.get("upgrade") == "websocket" and not self.old:
                return switching(request)
            self._admit(request)
            status, result = self._dispatch(request)
        except Refused as refused:
            status, result = refused.status, {"detail": refused.detail}
        text = b"" if status == 204 or result is None else json.dumps(result, default=self._encode).encode()
        return Reply(status, text)

    async def converse(self, request: Request, connection: Connection) -> None:
        """Take the events that a flow run emits; who waits for events on /events/out hears of none."""
        if "sec-websocket-protocol" in request.headers:  # its speakers say first who they are
            given = json.loads(await connection.receive_text() or "{}")
            if given.get("type") != "auth" or (self._secret and given.get("token") != self._secret):
                return
            await connection.send_text(json.dumps({"type": "auth_success"}))
        while (text := await connection.receive_text()) is not None:
            if request.path == "/events/in":
                self.events.append(json.loads(text))
                self.changed()

    @property
    def _secret(self) -> str | None:
        return self.auth_string or self.api_key

    def _encode(self, value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat() if self.old else value.isoformat().replace("+00:00", "Z")
        return str(value)

    def _admit(self, request: Request) -> None:
        """Refuse for a wrong version header, missing credentials, CSRF token or content type."""
        version = request.headers.get("x-prefect-api-version", "0.8.4")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or [*map(int, version.split("."))] < [0, 8, 0]:
            raise Refused(400, f"Unsupported API version {version!r}")
        if request.path in ("/health", "/ready"):
            return
        basic = self.auth_string and "Basic " + base64.b64encode(self.auth_string.encode()).decode()
        expected = basic or (self.api_key and f"Bearer {self.api_key}")
        if expected and request.headers.get("authorization") != expected:
            raise Refused(401, "Unauthorized")
        if self.csrf and request.method != "GET":
            client, token = (request.headers.get(f"prefect-csrf-{name}") for name in ("client", "token"))
            if token is None or client is None:
                raise Refused(403, "Missing CSRF token.")
            if self.csrf_tokens.get(client) != token:
                raise Refused(403, "Invalid CSRF token or client identifier.")
        # Engines of 3.0 to 3.4 do not say what the task runs are written in.
        kind = request.headers.get("content-type", JSON if request.path.startswith("/task_runs") else None)
        if request.body and kind != JSON:
            raise Refused(422, "the body is not application/json")

    def _dispatch(self, request: Request) -> Answer:
        for method, pattern, function in ROUTES:
            if method == request.method and (found := pattern.fullmatch(request.path)):
                return function(self, request, **found.groupdict())
        known = any(pattern.fullmatch(request.path) for _, pattern, _ in ROUTES)
        raise Refused(405 if known else 404, "Method Not Allowed" if known else "Not Found")

    @route("GET", "/health")
    def _health(self, request: Request) -> Answer:
        return 200, True

    @route("GET", "/ready")
    def _ready(self, request: Request) -> Answer:
        return 200, {"message": "OK"}

    @route("GET", "/version")
    def _api_version(self, request: Request) -> Answer:
        return 200, "0.8.4"

    @route("GET", "/admin/version")
    def _admin_version(self, request: Request) -> Answer:
        if self.cloud:
            raise Refused(404, "Not Found")
        return 200, self.version

    @route("GET", "/admin/storage")
    def _admin_storage(self, request: Request) -> Answer:
        if self.old:
            raise Refused(404, "Not Found")
        return 200, {"default_result_storage_block_id": None}

    @route("GET", "/csrf-token")
    def _csrf_token(self, request: Request) -> Answer:
        if not self.csrf:
            raise Refused(422, "CSRF protection is disabled.")
        client = request.query.get("client", "")
        token = self.csrf_tokens[client] = uuid4().hex
        return 200, {"token": token, "client": client, "expiration": now() + timedelta(hours=1)}
