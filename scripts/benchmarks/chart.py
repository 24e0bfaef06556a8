"""Rows become a chart: a pair of bars each, as long as their medians, in colours for light and dark backgrounds."""

from html import escape
from statistics import median

from scripts.benchmarks.figures import Row

OURS, THEIRS, TEXT = "#3b82f6", "#d97706", "#808890"
WIDTH, LABEL, BARS, BAR, GAP, HEAD = 860, 330, 380, 12, 14, 58


def svg(title: str, rows: list[Row], prefect: str) -> str:
    """Draw the rows; each has a scale of its own, for their units differ."""
    parts, y = [_text(8, 20, title, 14, weight="bold")], HEAD
    for x, colour, name in ((LABEL, OURS, "procworker"), (LABEL + 130, THEIRS, f"Prefect {prefect}")):
        if name == "procworker" or prefect != "-":
            parts += [_bar(x, 32, 12, colour), _text(x + 18, 42, name)]
    for row in rows:
        sides = [(OURS, row["ours"]), (THEIRS, row["theirs"])]
        shown = [(colour, median(samples)) for colour, samples in sides if samples]
        longest = max(value for _, value in shown) or 1
        parts.append(_text(LABEL - 8, y + len(shown) * BAR / 2 + 4, row["name"], anchor="end"))
        for colour, value in shown:
            length = max(1.0, BARS * max(0.0, value) / longest)
            ratio = f"   ({row['ratio']:.2f})" if colour == OURS and "ratio" in row else ""
            parts += [_bar(LABEL, y, length, colour), _text(LABEL + length + 6, y + 10, f"{value:.3g}{ratio}", 11)]
            y += BAR
        y += GAP
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{body}\n</svg>\n'


def _bar(x: float, y: float, length: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{length:.1f}" height="{BAR - 1}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, size: int = 12, weight: str = "normal", anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{TEXT}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
