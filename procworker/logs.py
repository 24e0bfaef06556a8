"""A run's logger: to Python's logging as everybody else, and to the run's own log on the server."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, MutableMapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from procworker.redaction import Mask

if TYPE_CHECKING:
    LoggerAdapter = logging.LoggerAdapter[logging.Logger]
else:
    LoggerAdapter = logging.LoggerAdapter

Ship = Callable[[dict[str, Any]], None]
"""Takes one log record in the form of POST /logs/ (contract 7)."""

RUN_LOGGER = "prefect.flow_runs.worker"


def run_context(flow_run_id: object, flow_run_name: str, **known: object) -> dict[str, Any]:
    """Return what a run's log lines carry in Prefect: every name, as a text, also of what is not known."""
    unknown = {
        "flow_name": "<unknown>",
        "worker_name": "<unknown>",
        "work_pool_name": "<unknown>",
        "work_pool_id": "unknown",
    }
    texts = {name: str(value) for name, value in known.items() if value is not None}
    return {"flow_run_name": flow_run_name, "flow_run_id": str(flow_run_id), **unknown, **texts}


class RunLogger(LoggerAdapter):
    """Log for one flow run; what is logged here is also shipped, whatever the host's logging is set to."""

    mask: Mask
    """Goes over every text before anybody sees it."""

    def __init__(self, extra: dict[str, Any], ship: Ship | None, ship_level: int, mask: Mask | None = None) -> None:
        super().__init__(logging.getLogger(RUN_LOGGER), extra)
        self.mask = mask or Mask()
        self._ship = ship
        self._ship_level = ship_level

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        # Where Prefect is imported too, its handler must not ship the same line a second time.
        own = {"send_to_api": False, **(self.extra or {})}
        return msg, {**kwargs, "extra": {**own, **(kwargs.get("extra") or {})}}

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        ships = self._ship is not None and level >= self._ship_level
        if not (ships or self.isEnabledFor(level)):
            return
        whole = _text_of(self.logger.name, level, msg, args, kwargs.get("exc_info"))
        shown = self.mask(whole)
        if self._ship is not None and ships:
            self._ship(self._record(level, shown))
        if shown != whole:
            msg, args, kwargs["exc_info"] = shown, (), None
        # Python 3.10 also counts the frame of LoggerAdapter.info.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + (1 if sys.version_info >= (3, 11) else 2)
        super().log(level, msg, *args, **kwargs)

    def _record(self, level: int, message: str) -> dict[str, Any]:
        return {
            "name": self.logger.name,
            "level": level,
            "message": message,
            "timestamp": datetime.now(timezone.utc).isoformat(),
            "flow_run_id": str((self.extra or {})["flow_run_id"]),
            "task_run_id": None,
        }


def _text_of(name: str, level: int, msg: object, args: tuple[object, ...], exc_info: Any) -> str:
    """Return the message with its traceback."""
    try:
        text = logging.LogRecord(name, level, "", 0, msg, args, None).getMessage()
    except (TypeError, ValueError, KeyError):  # logging itself complains about it
        text = str(msg)
    if isinstance(exc_info, BaseException):
        text += "\n" + "".join(traceback.format_exception(exc_info)).rstrip()
    elif exc_info:
        text += "\n" + traceback.format_exc().rstrip()
    return text
