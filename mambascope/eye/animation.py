"""A MambaEye at work: what it has seen of an image, where it looks, and how its answer changes. Needs Pillow only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mambascope._names import printable
from mambascope.utils import atomic_path

FORMATS = ("gif", "png")
_SIDE = 256  # pixels of the longer side of the image
_PANEL = 250  # width of the panel with the answers
_BAR = 24
_MARGIN = 12
_UNSEEN = 0.28  # brightness of what has not been seen
_INK, _MUTED, _FAINT = (34, 38, 43), (107, 114, 128), (217, 221, 226)
_ANSWER, _OTHER, _LOOK = (20, 134, 109), (122, 166, 214), (255, 193, 7)


@dataclass(frozen=True)
class Film:
    """What is shown.

    Attributes:
        canvas: Pixels [H, W, 3] uint8.
        positions: Glimpses in order [L, 2].
        probabilities: Answer after each glimpse [L, C].
        coverage: Information ratio after each glimpse [L].
        patch_size: Side of a glimpse.
        labels: One name per class; numbers if ``None``.
        title: Above the image.
        stopped: Whether it stopped because it was sure.
    """

    canvas: NDArray[np.uint8]
    positions: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    coverage: NDArray[np.float32]
    patch_size: int
    labels: Sequence[str] | None = None
    title: str = ""
    stopped: bool = False


def frame_steps(length: int, most: int) -> list[int]:
    """Glimpses that get a frame: all of the first, then ever fewer; always the last."""
    if length <= most:
        return list(range(1, length + 1))
    first = max(1, most // 3)
    steps = {*range(1, first + 1), *np.geomspace(first, length, most - first + 1).round().astype(int).tolist()}
    return sorted(steps | {length})


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def draw_frame(film: Film, step: int, top: int = 5) -> Image.Image:
    """The picture after ``step`` glimpses (from 1)."""
    height, width = film.canvas.shape[:2]
    scale = _SIDE / max(height, width)
    view = (max(1, round(width * scale)), max(1, round(height * scale)))
    seen = np.full((height, width, 1), _UNSEEN, dtype=np.float32)
    for row, column in film.positions[:step].tolist():
        seen[row : row + film.patch_size, column : column + film.patch_size] = 1.0
    shown = Image.fromarray((film.canvas * seen).astype(np.uint8)).resize(view, Image.Resampling.NEAREST)
    head = _BAR + _MARGIN
    size = (view[0] + _PANEL + 3 * _MARGIN, max(view[1], top * (_BAR + 6) + 60) + head + _MARGIN)
    frame = Image.new("RGB", size, (255, 255, 255))
    frame.paste(shown, (_MARGIN, head))
    draw = ImageDraw.Draw(frame)
    row, column = film.positions[step - 1].tolist()
    box = [column, row, column + film.patch_size, row + film.patch_size]
    corners = [_MARGIN + round(box[0] * scale), head + round(box[1] * scale)]
    corners += [_MARGIN + round(box[2] * scale) - 1, head + round(box[3] * scale) - 1]
    draw.rectangle(corners, outline=_LOOK, width=3)
    draw.text((_MARGIN, 8), _fit(film.title, view[0], 15), fill=_INK, font=_font(15))
    _answers(draw, film, step, (view[0] + 2 * _MARGIN, head), top)
    return frame


def _fit(text: str, width: int, size: int) -> str:
    """Cut so that it fits."""
    font, text = _font(size), printable(text)
    while text and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def _answers(draw: ImageDraw.ImageDraw, film: Film, step: int, corner: tuple[int, int], top: int) -> None:
    x, y = corner
    values = film.probabilities[step - 1]
    last = step == len(film.positions)
    note = " - sure, stops" if film.stopped and last else ""
    draw.text((x, 8), f"glimpse {step}, {100 * film.coverage[step - 1]:.0f} % seen{note}", fill=_INK, font=_font(15))
    # bars keep their places: the classes that win in the end, then the best of now
    final = np.argsort(-film.probabilities[-1], kind="stable")[:top]
    for i, index in enumerate(final.tolist()):
        name = film.labels[index] if film.labels is not None and index < len(film.labels) else str(index)
        here = y + i * (_BAR + 6)
        draw.rectangle([x, here, x + _PANEL, here + _BAR], fill=(244, 245, 247))
        colour = _ANSWER if index == int(values.argmax()) else _OTHER
        draw.rectangle([x, here, x + round(_PANEL * float(values[index])), here + _BAR], fill=colour)
        draw.text((x + 6, here + 4), _fit(str(name), _PANEL - 60, 14), fill=_INK, font=_font(14))
        draw.text((x + _PANEL - 6, here + 4), f"{100 * values[index]:.0f} %", fill=_INK, font=_font(14), anchor="ra")
    here = y + top * (_BAR + 6) + 8
    draw.text((x, here), "seen", fill=_MUTED, font=_font(13))
    draw.rectangle([x + 50, here + 3, x + _PANEL, here + 13], fill=_FAINT)
    draw.rectangle(
        [x + 50, here + 3, x + 50 + round((_PANEL - 50) * float(film.coverage[step - 1])), here + 13], fill=_LOOK
    )


def write_film(film: Film, path: str | os.PathLike[str], *, frames: int = 60, milliseconds: int = 160) -> Path:
    """Writes an animated GIF or PNG, as the ending of ``path`` says; the last frame stays for two seconds.

    Args:
        film: What is shown.
        path: ``.gif`` or ``.png`` (animated PNG).
        frames: Most frames; long sequences skip glimpses.
        milliseconds: Time of a frame.

    Raises:
        ValueError: If the ending is neither, or there is no frame.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise ValueError(f"animations are written as .gif or .png, got {path.name!r}")
    if frames < 1 or milliseconds < 1:
        raise ValueError(f"frames and milliseconds must be at least 1, got {frames} and {milliseconds}")
    pictures = [draw_frame(film, step) for step in frame_steps(len(film.positions), frames)]
    if kind == "gif":  # dithering would make noise of every frame, which compresses badly
        pictures = [picture.quantize(96, dither=Image.Dither.NONE) for picture in pictures]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary,
            format=kind.upper(),
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
        )
    return path
