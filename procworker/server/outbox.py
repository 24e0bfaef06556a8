"""Logs, events and labels on their way to the server: bounded, in batches, in the background."""

from __future__ import annotations

import json
import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import UUID

import anyio

from procworker.errors import Unauthorized, Unreachable
from procworker.redaction import SHORTEST_CREDENTIAL, Mask
from procworker.server.client import Client
from procworker.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self

JSON = dict[str, Any]
Item = tuple[JSON, int]  # with its size in bytes

ROOM = 8 * 1024 * 1024
LARGEST_EVENT = 1_500_000  # bytes; the server refuses more
SHORTEST_WAIT, LONGEST_WAIT, DRAIN_SECONDS = 0.05, 30.0, 5.0
TRUNCATED = "... [truncated]"

logger = logging.getLogger(__name__)


class Outbox:
    """Take logs, events and labels from any thread, never block, never raise; deliver them while there is room."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._client = client
        self._settings = settings
        self._mask = Mask(settings.secrets(), SHORTEST_CREDENTIAL)
        self._wait = max(settings.logging_to_api_batch_interval, SHORTEST_WAIT)
        self._largest = settings.logging_to_api_max_log_size
        if settings.is_cloud:
            self._largest = min(self._largest, settings.cloud_max_log_size)
        size = max(settings.logging_to_api_batch_size - self._largest, self._largest)
        self._logs = _Queue("logs", client.create_logs, size)
        self._events = _Queue("events", client.create_events, size)
        # A server with SQLite refuses most of these while it has other things to write: they wait until it has not.
        self._labels = _Queue("labels", self._send_labels, 1, retries=0, level=logging.DEBUG)

    async def __aenter__(self) -> Self:
        self._closing = anyio.Event()
        # Shielded, so that the last words of whoever is being cancelled still go out.
        self._delivery = anyio.CancelScope(shield=True)
        self._tasks = await anyio.create_task_group().__aenter__()
        self._tasks.start_soon(self._deliver)
        return self

    async def __aexit__(self, *error: object) -> None:
        """Deliver what is left, for a few seconds at most, even while being cancelled."""
        self._tasks.cancel_scope.shield = True
        self._delivery.deadline = anyio.current_time() + DRAIN_SECONDS
        self._closing.set()
        await self._tasks.__aexit__(None, None, None)
        for queue in (self._logs, self._events, self._labels):
            queue.give_up()

    async def _deliver(self) -> None:
        """Send everything every few seconds, less often while that fails, and a last time when closing."""
        with self._delivery:
            wait, last = self._wait, False
            while not last:
                with anyio.move_on_after(wait):
                    await self._closing.wait()
                last = self._closing.is_set()
                sent = [await queue.send_all() for queue in (self._logs, self._events)]
                await self._labels.send_all()
                wait = self._wait if all(sent) else min(2 * wait, LONGEST_WAIT)

    async def _send_labels(self, items: list[JSON], **options: Any) -> None:
        for item in items:
            await self._client.update_flow_run_labels(**item, **options)

    def log(self, record: JSON) -> None:
        """Send a record in the form of POST /logs/; only Cloud takes one that belongs to no run."""
        if not (self._settings.is_cloud and record.get("worker_id")):
            record = {name: value for name, value in record.items() if name != "worker_id"}
        if self._settings.logging_to_api_enabled and (record.get("flow_run_id") or "worker_id" in record):
            message = self._mask(str(record["message"])).replace("\0", "")
            self._logs.add([_fitted({**record, "message": message}, self._largest)])

    def event(self, event: JSON) -> None:
        """Send an event made by events.event()."""
        if (size := _size(event)) <= LARGEST_EVENT:
            self._events.add([(event, size)])

    def label(self, flow_run_id: UUID, labels: Mapping[str, str]) -> None:
        """Add labels to a flow run."""
        item = {"flow_run_id": flow_run_id, "labels": labels}
        self._labels.add([(item, _size(item))])


class _Queue:
    """What waits to be sent, oldest first; one batch at a time is under way."""

    def __init__(
        self,
        what: str,
        send: Callable[..., Awaitable[None]],
        batch_size: int,
        retries: int = 1,
        level: int = logging.WARNING,
    ) -> None:
        self._what, self._send, self._batch_size, self._retries, self._level = what, send, batch_size, retries, level
        self._items: deque[Item] = deque()
        self._size = 0
        self._lock = Lock()
        self._said: set[str] = set()

    def add(self, items: list[Item], back: bool = False) -> None:
        """Append items, or put them back where they were; without room the oldest go."""
        with self._lock:
            self._items.extendleft(items[::-1]) if back else self._items.extend(items)
            self._size += sum(size for _, size in items)
            full = self._size > ROOM
            while self._size > ROOM:
                self._size -= self._items.popleft()[1]
        if full:
            self._say("%s come faster than the server takes them; the oldest are dropped", self._what)

    async def send_all(self) -> bool:
        """Send batch after batch; False if nobody takes them, and then they wait."""
        while batch := self._take():
            try:
                await self._send([item for item, _ in batch], retries=self._retries)
                self._said.clear()
            except (Unreachable, Unauthorized) as error:
                self.add(batch, back=True)
                self._say("%s have to wait: %s", self._what, error)
                return False
            except anyio.get_cancelled_exc_class():
                self.add(batch, back=True)
                raise
            except Exception as error:
                self._say("%s are lost: %s", self._what, error)
        return True

    def give_up(self) -> None:
        if self._items:
            logger.log(self._level, "%d %s could not be delivered", len(self._items), self._what)

    def _take(self) -> list[Item]:
        """Take out one item, and more while they fit into one batch."""
        batch: list[Item] = []
        room = self._batch_size
        with self._lock:
            while self._items and (not batch or self._items[0][1] <= room):
                batch.append(self._items.popleft())
                room -= batch[-1][1]
                self._size -= batch[-1][1]
        return batch

    def _say(self, text: str, *values: object) -> None:
        """Warn, but only once until things are well again."""
        if text not in self._said:
            self._said.add(text)
            logger.log(self._level, text, *values)


def _size(item: JSON | str) -> int:
    return len(json.dumps(item, ensure_ascii=False, default=str).encode(errors="replace"))


def _fitted(record: JSON, largest: int) -> Item:
    """Cut the message so that the record has at most `largest` bytes; return the record with its size."""
    text, around = record["message"], _size({**record, "message": ""})
    room = largest - around
    if len(text) <= room and (size := _size(text) - 2) <= room:
        return record, around + size
    room = max(room - len(TRUNCATED), 0)
    end = bisect_right(range(1, min(len(text), room) + 1), room, key=lambda length: _size(text[:length]) - 2)
    cut = {**record, "message": text[:end] + TRUNCATED}
    return cut, _size(cut)
