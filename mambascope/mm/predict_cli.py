"""The command of ``tools/predict_dense.py``: pictures of masks or boxes, importance, refined cells, and the exit."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mambascope.data.files import LeftOut, find_images, picture_paths
from mambascope.mm.eval_cli import guarded, parse_options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Draws what a gated segmentor or detector found, where it looked again, and whether it did."
    )
    parser.add_argument("config", help="a config with a ScopeBackbone")
    parser.add_argument("checkpoint", help="written by its training")
    parser.add_argument("images", nargs="+", help="files, or folders of files")
    parser.add_argument(
        "--out", default="predictions", metavar="DIR", help="folder for the pictures (default predictions)"
    )
    parser.add_argument(
        "--threshold", type=float, help="gate confidence at which an image exits; default: the config's"
    )
    parser.add_argument("--score", type=float, default=0.3, help="least score of a drawn box (default 0.3)")
    parser.add_argument("--sheet", action="store_true", help="one picture with all images besides one for each")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number>")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="as for mim train")
    return parser


def picture(model: Any, pipeline: Any, path: Path, score: float) -> Any:
    """Runs one image and gathers what is drawn, a :class:`~mambascope.plotting.dense.DensePicture`."""
    from mambascope.mm.loading import load_image
    from mambascope.plotting.dense import DensePicture

    batch, original = load_image(pipeline, path)
    # the pipeline's image before normalisation: BGR at the size the model works on
    seen = batch["inputs"][0].flip(0).permute(1, 2, 0).float().numpy() / 255
    with torch.inference_mode():
        [sample] = model.test_step(batch)
    fact = sample.metainfo["scope"]
    classes = list(model.dataset_meta.get("classes") or [])
    present = [int(i) for i in np.flatnonzero(fact["presence"] >= 0.5)]
    labels = boxes = box_scores = masks = segmentation = None
    if "pred_sem_seg" in sample:
        segmentation = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
    else:
        keep = sample.pred_instances.scores >= score
        instances = sample.pred_instances[keep].cpu()
        boxes, labels, box_scores = instances.bboxes.numpy(), instances.labels.numpy(), instances.scores.numpy()
        masks = np.asarray(instances.masks) if "masks" in instances else None
    palette = model.dataset_meta.get("palette")
    return DensePicture(
        image=original,
        seen=seen,
        importance=fact["importance"],
        selected=fact["selected"],
        exited=fact["refined"] == 0,
        confidence=fact["confidence"],
        cell=2 * model.backbone.encoder.config.patch_size,
        name=path.name,
        classes=classes,
        present=present,
        palette=None if palette in (None, "random") else [tuple(c) for c in palette],
        segmentation=segmentation,
        boxes=boxes,
        labels=labels,
        scores=box_scores,
        masks=masks,
    )


def run(args: argparse.Namespace) -> int:
    """Predicts, prints a line per image and writes the pictures."""
    from mambascope.mm import loading
    from mambascope.models.gate import check_threshold
    from mambascope.plotting.dense import dense_sheet, draw_dense
    from mambascope.utils import pick_device

    left_out, out = LeftOut(), Path(args.out)
    sources = list(find_images(args.images, left_out))
    targets = picture_paths(sources, out, ["sheet"] if args.sheet else [])
    cfg = loading.read_config(args.config, parse_options(args.cfg_options))
    model = loading.build_model(cfg, args.checkpoint, pick_device(args.device))
    backbone = loading.scope_backbone(model)
    if args.threshold is not None:
        backbone.threshold = check_threshold(args.threshold)
    pipeline = loading.image_pipeline(cfg)
    pictures: list[Any] = []
    try:
        for source, target in zip(sources, targets, strict=True):
            made = picture(model, pipeline, source.path, args.score)
            pictures.append(made)
            draw_dense(made, target)
            print(f"{source.path}: {made.caption()}")
    finally:  # a file that cannot be read takes nothing from the others
        if args.sheet and pictures:
            dense_sheet(pictures, out / "sheet.png")
    print(f"pictures: {args.out}" + (f", left out: {left_out}" if left_out else ""), file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    args = _parser().parse_args(argv)
    return guarded(lambda: run(args))
