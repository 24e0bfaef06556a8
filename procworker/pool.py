"""Keep a worker's picture of its work pool in step with the server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from procworker.errors import ConfigurationError, ObjectNotFound
from procworker.server.client import Client
from procworker.server.models import WorkPool


async def read_or_create(
    client: Client, name: str, type: str, template: dict[str, Any] | None, create: bool, logger: logging.Logger
) -> WorkPool | None:
    """Read the pool; where it is missing, create it from template, or return None when that is not wanted."""
    try:
        return await client.read_work_pool(name, retries=0)
    except ObjectNotFound:
        if not create:
            logger.warning("Work pool %r does not exist: create it, or choose another with --pool", name)
            return None
    pool = await client.create_work_pool(name, type, template)
    logger.info("Work pool %r created", name)
    return pool


async def fill_empty_template(client: Client, pool: WorkPool, default: Callable[[], dict[str, Any]]) -> WorkPool:
    """Give a pool that was created without a job template the one of its type."""
    if pool.base_job_template:
        return pool
    template = default()
    await client.update_work_pool(pool.name, template)
    return pool.model_copy(update={"base_job_template": template})


def check_type(pool: WorkPool, before: WorkPool | None, type: str, logger: logging.Logger) -> None:
    """Raises ConfigurationError when a pool turns out to be for other workers; a later change is only warned about."""
    if pool.type == type or (before is not None and before.type == pool.type):
        return
    text = f"work pool {pool.name!r} is of type {pool.type!r}, but this worker serves {type!r} pools"
    if before is None:
        raise ConfigurationError(f"{text}: choose another pool, or another worker type with --type")
    logger.warning("Now %s", text)
