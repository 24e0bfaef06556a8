"""The table of what was seen of each generation of Prefect, as reStructuredText."""

from __future__ import annotations

from collections.abc import Mapping

Seen = Mapping[str, str]

NOTES = {
    "a": "no labels on the run: servers older than 3.1.7 have none",
    "b": "no events: servers of 2.20 have none",
    "c": "no task runs: from 3.6.14 on an engine logs in before it sends them, which an older server takes amiss",
    "d": "only on a server without password: Prefect before 3.1.10 knows none",
    "e": "Prefect 3 refuses a server of 2.x; the run becomes Crashed, and its log says so",
    "f": "no task runs where the server has a password: engines older than 3.6.14 send them without",
    "g": "something else",
}


def cell(closed: Seen | None, opened: Seen | None) -> str:
    """What there is on the embedded server, and on one without password: a word, and the letters of the notes."""
    seen = closed or opened
    if seen is None:
        return ""
    if seen["complete"] != "COMPLETED Completed":
        return "no: e" if seen["logs"] == "Major versions must match." else "no: g"
    lost = seen["task runs"] == "none"
    facts = {
        "a": seen["labels"] != "all",
        "b": seen["events"] == "no such route",
        "c": lost and opened is None,
        "d": closed is None,
        "f": lost and opened is not None and opened["task runs"] != "none",
    }
    return "yes" + "".join(f", {letter}" for letter, is_so in facts.items() if is_so)


def table(seen: Mapping[tuple[str, str], Seen], names: Mapping[str, str]) -> str:
    """Servers down, engines across; `names` are the versions of the generations that were there."""
    rows = [["server", *(f"flows on {name}" for name in names.values())]]
    for server, name in names.items():
        rows.append(
            [name, *(cell(seen.get((server, engine)), seen.get((f"{server}-open", engine))) for engine in names)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = "  ".join("=" * width for width in widths)
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    used = {letter for row in rows[1:] for text in row[1:] for letter in text.replace(":", ",").split(", ")}
    notes = [f"- {letter}: {text}" for letter, text in NOTES.items() if letter in used]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule, "", *notes, ""])
