"""Early exit over the two ONNX files of an export: coarse.onnx for every image, fine.onnx for the unsure ones only.

Needs numpy, onnxruntime and Pillow, not mambascope: tools/export.py puts a copy of this file beside the models.

    python early_exit.py IMAGE...
"""

import json
import sys
from pathlib import Path

import numpy as np


class EarlyExit:
    """Classifies batches of images with two ONNX files.

    Args:
        folder: What tools/export.py wrote: coarse.onnx, fine.onnx and export.json.
        threshold: Confidence at which the coarse answer is taken; None for the exported one.
    """

    def __init__(self, folder, threshold=None):
        import onnxruntime

        self.facts = json.loads((Path(folder) / "export.json").read_text(encoding="utf-8"))
        self.threshold = self.facts["threshold"] if threshold is None else threshold
        self.coarse, self.fine = (
            onnxruntime.InferenceSession(str(Path(folder) / f"{name}.onnx")) for name in ("coarse", "fine")
        )

    def __call__(self, images):
        """Images [B, C, H, W] float32 to logits [B, classes] and which images exited [B]."""
        names = [output.name for output in self.coarse.get_outputs()]
        coarse = dict(zip(names, self.coarse.run(None, {"images": images})))  # noqa: B905 (any Python 3)
        confidence, logits = coarse["confidence"], coarse["logits"].copy()
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
        """One image file as the model takes it [C, H, W]."""
        from PIL import Image, ImageOps

        channels, height, width = self.facts["input_size"]
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        # the picture covers size / crop_pct, then the centre is cut out
        wanted = [int(side / self.facts["crop_pct"]) for side in (width, height)]
        scale = max(goal / side for goal, side in zip(wanted, picture.size))  # noqa: B905
        size = [max(goal, int(side * scale + 1e-6)) for goal, side in zip(wanted, picture.size)]  # noqa: B905
        way = {"bilinear": Image.Resampling.BILINEAR}.get(self.facts["interpolation"], Image.Resampling.BICUBIC)
        picture = picture.resize(size, way)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32) / 255
        pixels = ((pixels - self.facts["mean"]) / self.facts["std"]).astype(np.float32).transpose(2, 0, 1)
        return pixels if channels == 3 else pixels.mean(0, keepdims=True)


def main(files):
    """Prints one line per image."""
    model = EarlyExit(Path(__file__).parent)
    logits, exited = model(np.stack([model.read(file) for file in files]))
    labels = model.facts["labels"] or range(logits.shape[1])
    for file, row, left in zip(files, logits, exited):  # noqa: B905
        odds = np.exp(row - row.max())
        best = int(row.argmax())
        print(f"{labels[best]}\t{odds[best] / odds.sum():.3f}\t{'coarse' if left else 'fine'}\t{file}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} IMAGE...")
    main(sys.argv[1:])
