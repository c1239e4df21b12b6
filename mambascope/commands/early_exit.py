"""Early exit over the two ONNX files of an export: coarse.onnx for every image, fine.onnx for the unsure ones only.

Needs numpy, onnxruntime and Pillow, not mambascope: tools/export.py puts a copy of this file beside the models, and
into it the rules by which tools/predict.py reads images.

    python early_exit.py IMAGE...
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mambascope.models.picture_files import read_picture, read_reason
from mambascope.models.pictures import check_value_range

BATCH = 32  # images that are in memory at once
FACTS_NAME = "export.json"


class EarlyExit:
    """Classifies batches of images with two ONNX files.

    Args:
        folder: What tools/export.py wrote: coarse.onnx, fine.onnx and export.json.
        threshold: Confidence at which the coarse answer is taken; None for the exported one.
    """

    def __init__(self, folder, threshold=None):
        import onnxruntime

        self.facts = json.loads((Path(folder) / FACTS_NAME).read_text(encoding="utf-8"))
        self.threshold = self.facts["threshold"] if threshold is None else threshold
        self.value_range = check_value_range(self.facts.get("value_range"))
        self.coarse, self.fine = (
            onnxruntime.InferenceSession(str(Path(folder) / f"{name}.onnx")) for name in ("coarse", "fine")
        )

    def __call__(self, images):
        """Images [B, C, H, W] float32 to logits [B, classes] and which images exited [B]."""
        names = [output.name for output in self.coarse.get_outputs()]
        coarse = dict(zip(names, self.coarse.run(None, {"images": images})))  # noqa: B905 (any Python 3)
        confidence, logits = coarse["confidence"], coarse["logits"].copy()
        coarse["coarse_logits"] = coarse["logits"]  # as the fine model calls them where both looks answer
        # at 0 and 1 the threshold alone decides, whatever the confidences round to
        exited = confidence >= self.threshold if 0 < self.threshold < 1 else np.full(len(images), self.threshold <= 0)
        rows = np.flatnonzero(~exited)
        if len(rows):
            feed = {
                i.name: images[rows] if i.name == "images" else coarse[i.name][rows] for i in self.fine.get_inputs()
            }
            logits[rows] = self.fine.run(["logits"], feed)[0]
        return logits, exited

    def read(self, path):
        """One image file as the model takes it [C, H, W] float32."""
        channels, *sides = self.facts["input_size"]
        picture = read_picture(path, channels, self.value_range)
        bands = [picture] if channels == 3 else map(Image.fromarray, np.asarray(picture).transpose(2, 0, 1).copy())
        pixels = np.dstack([np.asarray(self._cropped(band, *sides)) for band in bands]).astype(np.float32) / 255
        mean, std = (np.asarray(self.facts[name], np.float32) for name in ("mean", "std"))
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def _cropped(self, picture, height, width):
        """The picture resized to cover size / crop_pct, and the centre of that."""
        goal = [math.floor(side / self.facts["crop_pct"]) for side in (width, height)]
        if goal[0] == goal[1]:
            short = min(picture.size)
            size = [goal[0] if side == short else int(goal[0] * side / short) for side in picture.size]
        else:
            ratio = min(side / length for side, length in zip(picture.size, goal))  # noqa: B905
            size = [round(side / ratio) for side in picture.size]
        if size != list(picture.size):
            picture = picture.resize(size, Image.Resampling[self.facts["interpolation"].upper()])
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return picture.crop((left, top, left + width, top + height))


def main(files):
    """Prints one line per image, in order; names files that cannot be read. Returns the status: 1 if there were any."""
    model = EarlyExit(Path(__file__).parent)
    labels, bad = model.facts["labels"], 0
    for start in range(0, len(files), BATCH):
        images, names = [], []
        for file in files[start : start + BATCH]:
            try:
                images.append(model.read(file))
                names.append(file)
            except Exception as error:  # decoders raise a dozen kinds of exceptions on damaged files
                bad += 1
                print(f"cannot read image {file}: {read_reason(error)}", file=sys.stderr)
        if not images:
            continue
        logits, exited = model(np.stack(images))
        for file, row, left in zip(names, logits, exited):  # noqa: B905
            odds = np.exp(row - row.max())
            best = int(row.argmax())
            label = labels[best] if labels else best
            print(f"{label}\t{odds[best] / odds.sum():.3f}\t{'coarse' if left else 'fine'}\t{file}")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} IMAGE...")
    sys.exit(main(sys.argv[1:]))
