"""Lines for people that are too long for a terminal: wrapped with a hanging indent, never cut; whole in pipes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from procworker.cli.terminal import Terminal, width

Piece = tuple[str, str]
"""A text, and its style or ""."""
NARROWEST = 20


def lines_of(terminal: Terminal, pieces: Sequence[Piece], indent: int) -> list[str]:
    """Lay pieces out one after the other; what does not fit goes on below, indented."""
    if not terminal.is_a_terminal:
        return ["".join(terminal.paint(text, *filter(None, [style])) for text, style in pieces).rstrip()]
    columns = max(terminal.columns - 1, indent + NARROWEST)
    lines: list[list[Piece]] = [[]]
    room = columns
    for word, style in _words(pieces, columns - indent):
        if width(word.rstrip(" ")) > room:
            lines.append([])
            room = columns - indent
        lines[-1].append((word, style))
        room -= width(word)
    return [" " * (indent if number else 0) + _painted(terminal, line) for number, line in enumerate(lines)]


def visible(text: str) -> str:
    """Show line ends, escape codes and what else cannot be printed as Python would write it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@contextmanager
def warnings_heard() -> Iterator[list[str]]:
    """What our modules warn of within the block, each once; nothing of it is printed."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING and (text := record.getMessage()) not in heard:
                heard.append(text)

    logger, listener = logging.getLogger("procworker"), Listener()
    before = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


def _words(pieces: Sequence[Piece], longest: int) -> Iterator[Piece]:
    """Words with the blanks behind them; one that fits on no line is broken."""
    for text, style in pieces:
        word = ""
        for character in text:
            if character != " " and (word.endswith(" ") or width(word + character) > longest):
                yield word, style
                word = ""
            word += character
        if word:
            yield word, style


def _painted(terminal: Terminal, line: Sequence[Piece]) -> str:
    """Paint what stands together in one style at once."""
    merged: list[list[str]] = []
    for word, style in line:
        if merged and merged[-1][1] == style:
            merged[-1][0] += word
        else:
            merged.append([word, style])
    if merged:
        merged[-1][0] = merged[-1][0].rstrip()
    return "".join(terminal.paint(text, *filter(None, [style])) for text, style in merged)
