"""Images in one folder per class, on disk or in .tar archives, as timm's readers."""

from __future__ import annotations

import os
import re
import shlex
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
from timm.data.readers.reader import Reader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar, extract_tarinfos

from mambascope._names import class_name
from mambascope.data.errors import DataError
from mambascope.data.files import LeftOut, ending, image_endings, is_hidden, walk_images

_DIGITS = re.compile(r"(\d+)")
_LISTED = 8  # names shown in a message
_CACHED = 10 * 1024**3  # bytes of archives above which timm keeps a list of their content
_TINY_IMAGENET = "val_annotations.txt"  # lines of file, class and box, beside the folder of the unsorted images


def some(names: list[str]) -> str:
    """The first names of a long list."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def natural_key(text: str) -> list[str | int]:
    """Sorts like timm's key of that name, which fails at digits such as ``²``."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(text.lower())]


def number_classes(folders: Iterable[str]) -> dict[str, int]:
    """The number of each class, by name; several folders may spell one name.

    The order is that of the folders as they are written on the disk, which older runs followed too.
    """
    names = dict.fromkeys(class_name(f) for f in sorted(folders, key=lambda f: (natural_key(f), f)))
    return {name: number for number, name in enumerate(names)}


ClassMap = str | Sequence[str] | None


def read_class_map(source: ClassMap, split: Path) -> dict[str, int] | None:
    """The number of each class, from the names in order or from a text file with one name per line.

    Args:
        given: The names, or the file: its path, or its name in the split or beside it.
        split: Folder or archive of the split.

    Raises:
        DataError: When the file cannot be read, or a name has two numbers.
    """
    if source is None:
        return None
    if not isinstance(source, str):
        pairs = [(name, number) for number, name in enumerate(source)]
    else:
        places = [Path(source), split / source, split.parent / source]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise DataError(f"class_map {source} does not exist")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"class_map {source} is no text file with one class name per line: {error}") from None
        pairs = [(line.strip(), number) for number, line in enumerate(lines) if line.strip()]
    numbers = {class_name(name): number for name, number in pairs}
    if len(numbers) < len(pairs):
        names = Counter(class_name(name) for name, _ in pairs)
        raise DataError(f"class_map names twice: {some([name for name, count in names.items() if count > 1])}")
    return numbers


class FolderReader(ReaderImageFolder):
    """The images below a folder; the class of each is the first folder on its way.

    Args:
        root: The folder.
        class_map: Number of each class; by default in natural order of the folders.
        left_out: Counts what is no image.

    Raises:
        DataError: When there are no images, images outside of class folders, class folders without images, or class
            folders that the class map does not name.
    """

    def __init__(self, root: Path, class_map: dict[str, int] | None, left_out: LeftOut) -> None:
        Reader.__init__(self)
        self.root = str(root)
        start = len(os.path.join(self.root, ""))
        try:
            files = list(walk_images(self.root, left_out))
            folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
        except OSError as error:
            raise DataError(f"cannot read {error.filename}: {error.strerror}") from None
        tops = [file[start:].partition(os.sep)[0] for file in files]
        used = set(tops)
        loose = sorted(used - set(folders))
        note = f"; left out: {left_out}" if left_out else ""
        if not files and folders:
            raise DataError(f"no images in {root}: its class folders ({some(folders)}) hold none{note}")
        if not files:
            raise DataError(f"no images in {root}; it must hold one folder of images per class{note}")
        if loose and len(loose) == len(used):
            raise DataError(unsorted(root))
        if empty := [name for name in folders if name not in used]:
            raise DataError(f"class folders without images in {root}: {some(empty)}; add images or remove the folders")
        if loose:
            raise DataError(f"images in {root} must lie in one folder per class, found {some(loose)} beside them")
        self.class_to_idx = number_classes(used) if class_map is None else class_map
        if unknown := sorted(name for name in used if class_name(name) not in self.class_to_idx):
            raise DataError(f"class folders in {root} that class_map does not name: {some(unknown)}")
        numbers = {name: self.class_to_idx[class_name(name)] for name in used}
        self.samples = [(file, numbers[top]) for file, top in zip(files, tops, strict=True)]
        self.samples.sort(key=lambda sample: natural_key(sample[0][start:]))  # stable: equal keys stay sorted by name


class TarReader(ReaderImageInTar):
    """The images of one .tar file or of all .tar files in a folder, archives inside of archives included.

    The class of an image is the first folder on its way, below what all images share; where there is none it is the
    archive.

    Args:
        root: The file or folder.
        class_map: Number of each class; by default in natural order of the names.
        left_out: Counts what is no image.

    Raises:
        DataError: When an archive cannot be read, there are no images, or the class map does not name a class.
    """

    def __init__(self, root: Path, class_map: dict[str, int] | None, left_out: LeftOut) -> None:
        Reader.__init__(self)
        self.root = str(root)
        try:
            samples, _, _, archives = extract_tarinfos(self.root, extensions=set(image_endings()))
            self._count_others(left_out)
        except (RuntimeError, ValueError, AssertionError, OSError, tarfile.TarError) as error:
            if "not enough values to unpack" in str(error):
                raise DataError(f"no images in {root}; it must hold one folder of images per class") from None
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"cannot read {root}: {reason}") from error
        keep, ways = [], []
        for number, (member, archive, inner) in enumerate(samples):
            parts = _parts(member.path)
            if not any(map(left_out.hides, parts)):
                keep.append(number)
                ways.append(([_stem(name) for name in (archive, inner and inner.name) if name], parts[:-1]))
        names = self._classes(ways, root, left_out)
        self.samples = samples[keep]
        self.class_to_idx = number_classes(names) if class_map is None else class_map
        if unknown := sorted({name for name in names if class_name(name) not in self.class_to_idx}):
            raise DataError(f"classes in {root} that class_map does not name: {some(unknown)}")
        self.targets = np.array([self.class_to_idx[class_name(name)] for name in names])
        self.root_is_tar = len(archives) == 1 and archives[0][0] is None
        self.tar_state = archives[0][1] if self.root_is_tar else dict(archives)
        self.cache_tarfiles = True

    def _count_others(self, left_out: LeftOut) -> None:
        """Counts what timm's scan of the archives passes over."""
        root = Path(self.root)
        paths = [root] if root.is_file() else sorted(root.glob("[!.]*.tar"))
        if sum(path.stat().st_size for path in paths) > _CACHED:
            return  # timm keeps its list of so large archives, as reading them takes long
        seen = {*image_endings(), ".tar"}
        for path in paths:
            with tarfile.open(path) as archive:
                for member in archive:
                    parts = _parts(member.path)
                    if member.isfile() and ending(parts[-1]) not in seen and not any(map(left_out.hides, parts)):
                        left_out.takes(parts[-1])

    @staticmethod
    def _classes(ways: list[tuple[list[str], list[str]]], root: Path, left_out: LeftOut) -> list[str]:
        """The class of each image, from the archives that it is in and its folders there."""
        if not ways:
            raise DataError(f"no images in {root}; left out: {left_out}")
        ends = [choose(folders for _, folders in ways) for choose in (min, max)]  # all others lie between them
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
        alone = [not archives and len(folders) == shared for archives, folders in ways]
        if any(alone) and not all(alone):
            raise DataError(f"images in {root} must lie in one folder per class, found {sum(alone)} beside them")
        if all(alone) and not shared:
            raise DataError(unsorted(root))
        # images that are all in one folder: it is their class
        return [folders[shared] if folders[shared:] else [*folders, *archives][-1] for archives, folders in ways]


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _stem(archive: str) -> str:
    return os.path.splitext(os.path.basename(archive))[0]


def unsorted(split: Path, folder: str = "") -> str:
    """What is wrong with images that do not lie in folders of their classes, and what to do."""
    message = f"the images in {split / folder} are not sorted: {split} must hold one folder per class"
    if folder and (split / _TINY_IMAGENET).is_file():
        loop = f"while read -r f c _; do mkdir -p $c && mv {folder}/$f $c/; done < {_TINY_IMAGENET}; rmdir {folder}"
        message += f"; sort them: (cd {shlex.quote(str(split))} && {loop})"
    elif folder and (split / folder).is_dir() and any(p.is_dir() for p in (split / folder).iterdir()):
        message += f"; if those are below {folder}, name the split {split.name}/{folder}"
    return message
