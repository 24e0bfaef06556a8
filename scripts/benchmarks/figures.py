"""Samples of both sides become rows: medians, ratios and targets."""

from operator import truediv
from statistics import median
from typing import Any

Sample = dict[str, float]
Row = dict[str, Any]


def compare(ours: list[Sample], theirs: list[Sample], most: Sample, of: str = "median") -> list[Row]:
    """Make a row of each name; samples at the same place are pairs; `most` bounds our median or the ratio."""
    rows = []
    for name in ours[0]:
        one, other = ([sample[name] for sample in side if name in sample] for side in (ours, theirs))
        row: Row = {"name": name, "ours": one, "theirs": other, "median": median(one), "target": ""}
        if other and all(other):
            row |= {"ratio": median(one) / median(other), "pairwise": median(map(truediv, one, other))}
        if name in most:
            row["target"] = f"{of} <= {most[name]:g} {'met' if row[of] <= most[name] else 'MISSED'}"
        rows.append(row)
    return rows


def prefixed(prefix: str, rows: list[Row]) -> list[Row]:
    """Say in each name what all of these rows are about."""
    return [row | {"name": prefix + row["name"]} for row in rows]


def table(rows: list[Row], prefect: str) -> str:
    """Show the rows to a person."""
    lines = [("median (min-max)", "procworker", f"Prefect {prefect}", "ratio", "pairwise", "target")]
    for row in rows:
        ratios = [f"{row[kind]:.2f}" if kind in row else "" for kind in ("ratio", "pairwise")]
        lines.append((row["name"], _spread(row["ours"]), _spread(row["theirs"]), *ratios, row["target"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _spread(samples: list[float]) -> str:
    ends = f" ({min(samples):.3g}-{max(samples):.3g})" if len(samples) > 1 else ""
    return f"{median(samples):.4g}{ends}" if samples else ""
