"""Read the blocks and variables that a job refers to, and remember what of it is secret and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from procworker.server.client import Client
from procworker.server.models import BlockDocument, Variable


class Reader:
    """A template's Resolver (procworker.template) that only reads."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.secrets: set[str] = set()
        """Every text and number of every block that was read."""
        self.notes: list[str] = []

    async def read_block_document_by_name(self, name: str, block_type_slug: str) -> BlockDocument:
        return self._kept(await self._client.read_block_document_by_name(name, block_type_slug))

    async def read_block_document(self, block_document_id: Any) -> BlockDocument:
        return self._kept(await self._client.read_block_document(block_document_id))

    async def read_variable_by_name(self, name: str) -> Variable | None:
        variable = await self._client.read_variable_by_name(name)
        if variable is None:
            self.notes.append(f"the server has no variable {name!r}: empty")
        return variable

    def _kept(self, document: BlockDocument) -> BlockDocument:
        self.secrets.update(_leaves(document.data))
        return document


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
