"""What all pages share: the frame, pictures as data, charts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

_HERE = Path(__file__).parent
_SIDE = 384  # pixels; larger pictures are made smaller, so that a page can be sent by mail
_WIDTH, _HEIGHT, _PAD = 560, 200, 46  # of a chart, in SVG units
_COLOURS = ("var(--one)", "var(--two)", "var(--three)")


def render(template: str, **facts: Any) -> str:
    """A page from a template of this folder; a fact that is missing is an error, and all text is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template(template).render(style=Markup((_HERE / "style.css").read_text(encoding="utf-8")), **facts)


def number(value: float | None) -> str:
    """Four significant digits, as the terminal prints them."""
    return "not finite" if value is None else f"{value:.4g}"


def picture(source: Path | bytes, side: int = _SIDE) -> str:
    """A picture as a data URI, WebP, its longer side at most `side` pixels."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def line_chart(series: dict[str, Sequence[tuple[float, float]]], x_title: str) -> Markup:
    """Lines over x as inline SVG, with a legend, both axes' ends labelled; empty where there is nothing to draw."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return Markup("")
    xs, ys = ([p[i] for points in drawn.values() for p in points] for i in (0, 1))
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(0.0, *ys), max(ys)
    wide, tall = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def at(x: float, y: float) -> str:
        return f"{_PAD + (x - low_x) / wide * (_WIDTH - 2 * _PAD):.1f},{_HEIGHT - 28 - (y - low_y) / tall * (_HEIGHT - 44):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{Markup.escape(" and ".join(drawn))}">']
    for y in (low_y, (low_y + high_y) / 2, high_y):
        _, height = at(low_x, y).split(",")
        parts.append(f'<line class="grid" x1="{_PAD}" x2="{_WIDTH - _PAD}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text x="{_PAD - 6}" y="{float(height) + 4}" text-anchor="end">{number(y)}</text>')
    for x, anchor in ((low_x, "start"), (high_x, "end")):
        parts.append(f'<text x="{at(x, 0).split(",")[0]}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{number(x)}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 10}" text-anchor="middle">{Markup.escape(x_title)}</text>')
    for place, (name, points) in enumerate(drawn.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        parts.append(f'<polyline style="stroke:{colour}" points="{" ".join(at(x, y) for x, y in points)}"/>')
        if len(points) == 1:
            left, top = at(*points[0]).split(",")
            parts.append(f'<circle style="fill:{colour}" cx="{left}" cy="{top}" r="3"/>')
        parts.append(
            f'<text style="fill:{colour}" x="{_PAD + 8 + 150 * place}" y="14" font-weight="600">{Markup.escape(name)}</text>'
        )
    return Markup("".join(parts) + "</svg>")


def smoothed(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` values at each place, thinned to some three hundred."""
    sums, total = [], 0.0
    for i, (x, y) in enumerate(points):
        total += y - (points[i - window][1] if i >= window else 0.0)
        sums.append((x, total / min(i + 1, window)))
    step = max(1, len(sums) // 300)
    return sums[::step] + ([sums[-1]] if sums and (len(sums) - 1) % step else [])
