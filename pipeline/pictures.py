"""Pictures laid out in a labelled grid."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_PAD = 8
_TEXT = 12  # font size in pixels
_LINE = 15
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def labelled_grid(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    row_captions: Sequence[str] = (),
    min_side: int = 160,
) -> Image.Image:
    """Lay pictures out row by row.

    Args:
        rows: pictures, each row at most as long as the first.
        columns: a heading per column.
        captions: a caption under each picture.
        row_captions: a caption left of each row.
        min_side: smaller pictures are enlarged to at least this many pixels, by a whole factor.

    Returns:
        An RGB picture; the same pixels for the same input.
    """
    first = rows[0][0]
    factor = max(1, -(-min_side // min(first.size)))
    width, height = first.width * factor, first.height * factor
    font = ImageFont.load_default(_TEXT)
    fits = max(10, int(width / (_TEXT * 0.52)))
    wrapped = [[textwrap.wrap(text, fits)[:5] for text in row] for row in captions]
    under = max((len(lines) for row in wrapped for lines in row), default=0) * _LINE
    top = _LINE + _PAD if columns else 0
    left = 190 if row_captions else 0
    page = Image.new(
        "RGB",
        (left + len(rows[0]) * (width + _PAD) + _PAD, top + len(rows) * (height + under + _PAD) + _PAD),
        _PAPER,
    )
    pen = ImageDraw.Draw(page)
    for c, heading in enumerate(columns):
        pen.text((left + _PAD + c * (width + _PAD) + width / 2, _PAD), heading, _INK, font, anchor="ma")
    for r, row in enumerate(rows):
        y = top + _PAD + r * (height + under + _PAD)
        if row_captions:
            lines = textwrap.wrap(row_captions[r], 28)[: max(1, height // _LINE)]
            pen.multiline_text((_PAD, y + height / 2), "\n".join(lines), _INK, font, anchor="lm", spacing=3)
        for c, picture in enumerate(row):
            x = left + _PAD + c * (width + _PAD)
            shown = picture.resize((width, height), Image.Resampling.BICUBIC) if factor > 1 else picture
            page.paste(shown, (x, y))
            if wrapped:
                pen.multiline_text((x, y + height + 3), "\n".join(wrapped[r][c]), _INK, font, spacing=3)
    return page
