"""Samples of both sides become rows: medians, ratios and targets."""

from collections.abc import Mapping, Sequence
from operator import truediv
from statistics import median
from typing import Any

Sample = Mapping[str, float]
Row = dict[str, Any]


def compare(
    ours: Sequence[Sample], theirs: Sequence[Sample], most: Sample = {}, most_ratio: Sample = {}
) -> list[Row]:
    """Make a row of each name; samples at the same place are pairs, targets are for medians."""
    rows = []
    for name in ours[0]:
        one, other = ([sample[name] for sample in side if name in sample] for side in (ours, theirs))
        row: Row = {"name": name, "ours": one, "theirs": other, "ratio": None, "pairwise": None, "target": ""}
        if other and all(other):
            row["ratio"] = median(one) / median(other)
            row["pairwise"] = median(map(truediv, one, other))
        for what, limits, value in (("", most, median(one)), ("ratio ", most_ratio, row["ratio"])):
            if name in limits and value is not None:
                row["target"] = f"{what}<= {limits[name]:g} {'met' if value <= limits[name] else 'MISSED'}"
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Show the rows to a person."""
    lines = [("median (min-max)", "procworker", "Prefect", "ratio", "pairwise", "target")]
    for row in rows:
        ratio, pairwise = (f"{row[kind]:.2f}" if row[kind] else "" for kind in ("ratio", "pairwise"))
        lines.append(
            (row["name"], _spread(row["ours"]), _spread(row["theirs"]), ratio, pairwise, row["target"])
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _spread(samples: Sequence[float]) -> str:
    if len(samples) < 2:
        return "".join(f"{sample:.4g}" for sample in samples)
    return f"{median(samples):.3g} ({min(samples):.3g}-{max(samples):.3g})"
