"""Which of a user's files are images: one answer for training, evaluation and prediction."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mambascope.models.picture_files import image_formats

ARRAYS = ".npy"  # images, where there are no others

_OTHER_USES = (".fit", ".gbr", ".pcd", ".vst")  # sports data, circuit boards, point clouds, drawings: rarely images
_SYSTEM = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")  # folders that machines, not users, put beside images
_LISTED, _KINDS = 3, 8  # hidden names and endings in a message


@cache
def image_endings() -> frozenset[str]:
    """Endings, in lower case with their dot, of the files that :func:`~mambascope.data.image_io.open_image` reads."""
    formats = {*image_formats(), "MPO"}  # read as JPEG
    extensions = Image.registered_extensions()
    return frozenset(ending for ending in extensions if extensions[ending] in formats and ending not in _OTHER_USES)


def ending(name: str) -> str:
    """The ending of a file name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data by its name: ``.ipynb_checkpoints``, ``._a.png``, ``__MACOSX``."""
    return name.startswith(".") or name in _SYSTEM


class LeftOut:
    """Counts what is left out of folders, and says it in one line.

    Args:
        accepted: Endings of what is taken; by default those of images.
    """

    def __init__(self, accepted: frozenset[str] | None = None) -> None:
        self._accepted = image_endings() if accepted is None else accepted
        self.endings: Counter[str] = Counter()
        self.hidden = self.loops = 0
        self._names: list[str] = []  # the first hidden ones
        self._loop = ""

    def __bool__(self) -> bool:
        return bool(self.hidden or self.endings or self.loops)

    def __str__(self) -> str:
        parts = []
        if self.endings:
            first = sorted(self.endings.most_common(_KINDS))
            kinds = ", ".join(f"{number} {kind or 'without ending'}" for kind, number in first)
            more = ", …" if len(self.endings) > _KINDS else ""
            parts.append(f"{_count(self.endings.total(), 'file')} of no image format ({kinds}{more})")
        if self.hidden:
            more = ", …" if self.hidden > len(self._names) else ""
            parts.append(f"{_count(self.hidden, 'hidden name')} ({', '.join(self._names)}{more})")
        if self.loops:
            parts.append(f"{_count(self.loops, 'link')} back to a folder above ({self._loop})")
        return ", ".join(parts)

    def hides(self, name: str) -> bool:
        """Whether a file or folder is hidden; counts it if so."""
        if not is_hidden(name):
            return False
        self.hidden += 1
        if len(self._names) < _LISTED and name not in self._names:
            self._names.append(name)
        return True

    def takes(self, name: str) -> bool:
        """Whether a file is an image by its name; counts it if not."""
        kind = ending(name)
        if kind in self._accepted:
            return True
        self.endings[kind] += 1
        return False

    def circles(self, path: str) -> None:
        """Counts a link that leads back to a folder above it."""
        self.loops += 1
        self._loop = self._loop or path


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def walk(folder: str, left_out: LeftOut, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the images in a folder and its sub-folders, links to folders included, sorted by name.

    Args:
        folder: Where to look.
        left_out: Counts the others.
        above: Real paths of the folders on the way down, so that a link cannot lead round in a circle.

    Raises:
        OSError: When a folder cannot be read.
    """
    above = above or (os.path.realpath(folder),)
    with os.scandir(folder) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    for entry in entries:
        if left_out.hides(entry.name):
            continue
        if _is_folder(entry):
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if real in above:
                left_out.circles(entry.path)
            else:
                yield from walk(entry.path, left_out, (*above, real))
        elif left_out.takes(entry.name):
            yield entry.path


def walk_images(folder: str, left_out: LeftOut) -> Iterator[str]:
    """As :func:`walk`; where there are no images, arrays (``.npy``) are the images."""
    empty = True
    for path in walk(folder, left_out):
        empty = False
        yield path
    if empty and ARRAYS in left_out.endings:
        for path in walk(folder, LeftOut(frozenset({ARRAYS}))):
            left_out.endings -= Counter({ARRAYS: 1})
            yield path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere; opening it says why
        return False


class Source(NamedTuple):
    """An image file: where it is, and its name below the folder that all inputs share."""

    path: Path
    name: str


def find_images(inputs: Sequence[str], left_out: LeftOut | None = None) -> Iterator[Source]:
    """Files as they are given, and the images of folders: sorted, with their sub-folders.

    Two files have one name only if they are the same file, so that what is written for each overwrites nothing.

    Args:
        inputs: Files and folders.
        left_out: Counts what is in the folders and is no image.

    Raises:
        ValueError: An input that does not exist, or a folder without images.
    """
    left_out = LeftOut() if left_out is None else left_out
    paths = [Path(argument) for argument in inputs]
    shared = os.path.commonpath([os.path.abspath(p if p.is_dir() else p.parent) for p in paths])
    for path in paths:
        if path.is_dir():
            any_image = False
            for file in walk_images(str(path), left_out):
                any_image = True
                yield Source(Path(file), os.path.relpath(file, shared))
            if not any_image:
                raise ValueError(f"folder {path} holds no images" + (f": {left_out}" if left_out else ""))
        elif path.exists():
            yield Source(path, os.path.relpath(path, shared))
        else:
            raise ValueError(f"{path} does not exist")


def picture_paths(sources: Sequence[Source], folder: Path, taken: Sequence[str] = ()) -> list[Path]:
    """Where a PNG of each image is written, named as the image is; numbered where two would be one.

    Args:
        sources: The images.
        folder: That the pictures are written to.
        taken: Names without ending that are used for something else.

    Raises:
        ValueError: When a picture would replace an image.
    """
    read = {os.path.realpath(source.path) for source in sources}
    used, paths = set(taken), []
    for source in sources:
        plain, number = os.path.splitext(source.name)[0], 1
        stem = plain
        while stem in used:  # a.jpg beside a.png
            number += 1
            stem = f"{plain}-{number}"
        used.add(stem)
        paths.append(folder / f"{stem}.png")
        if os.path.realpath(paths[-1]) in read:
            raise ValueError(f"folder {folder} holds images that are read: the picture would replace {paths[-1]}")
    return paths
