"""Small models and data for the tests of the OpenMMLab adapters."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

REASON = "needs the OpenMMLab stack: make mm"
pytest.importorskip("mmengine", reason=REASON)
pytest.importorskip("mmcv", reason=REASON)
pytest.importorskip("mmseg", reason=REASON)
pytest.importorskip("mmdet", reason=REASON)

from mmengine.config import Config  # noqa: E402
from mmengine.registry import RUNNERS  # noqa: E402

from mambascope.data.export_scopedigits import export  # noqa: E402
from mambascope.mm import ScopeBackbone, VimBackbone  # noqa: E402
from mambascope.mm.loading import register  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "mm_configs"
MIM = Path(sys.executable).parent / "mim"
# two blocks per quarter would only cost time; four blocks are the least
_numbers = itertools.count()
TINY = {"depth": 4, "embed_dim": 32}


def scope(**options):
    """A small gated backbone."""
    arch_options = {**TINY, **options.pop("arch_options", {})}
    return ScopeBackbone(
        "mambascope_nano_patch8_64", arch_options=arch_options, **{"gate": {"num_classes": 5}, **options}
    )


def vim(**options):
    """The plain Vim of the same size."""
    arch_options = {**TINY, **options.pop("arch_options", {})}
    return VimBackbone("vim_nano_patch8_64", arch_options=arch_options, **options)


def refined_images(model):
    """Counts of images in the backbone's fine passes from now on, one for each pass."""
    counts, forward_fine = [], model.encoder.forward_fine

    def counted(x, *args, **kwargs):
        counts.append(len(x))
        return forward_fine(x, *args, **kwargs)

    model.encoder.forward_fine = counted
    return counts


def demo_config(kind, data=None, work_dir=None, **options):
    """The demo config of "seg" or "det" with a small encoder, on ``data``; ``options`` as in --cfg-options."""
    name = {"seg": "upernet_scope_demo.py", "det": "cascade_scope_demo.py"}[kind]
    cfg = Config.fromfile(CONFIGS / name)
    register(cfg.default_scope)
    cfg.merge_from_dict(
        {
            "model.backbone.arch_options.depth": 4,
            "model.backbone.arch_options.embed_dim": 32,
            "model.backbone.init_cfg.checkpoint": "",
            "train_dataloader.batch_size": 4,
            "train_cfg.max_iters": 2,
            "train_cfg.val_interval": 2,
            "default_hooks.checkpoint.interval": 2,
            "default_hooks.logger.interval": 1,
        }
    )
    if data is not None:
        for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
            cfg[loader].dataset.data_root = str(data)
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            for metric in evaluator:
                if metric.type == "CocoMetric":
                    metric.ann_file = f"{data}/annotations/instances_val2017.json"
    cfg.merge_from_dict(options)
    cfg.work_dir = str(work_dir) if work_dir else None
    cfg.launcher = "none"
    return cfg


def make_data(kind, out, **options):
    """ScopeDigits of 64 pixels in ADE20K's or COCO's layout."""
    options = {"size": 64, "train": 8, "val": 6, **options}
    return export(kind, out, quiet=True, **options)


def runner(kind, data, work_dir, **options):
    """The demo's runner on ``data``, see :func:`demo_config`."""
    return named_runner(demo_config(kind, data, work_dir, **options))


def named_runner(cfg):
    """A config's runner with a name of its own: mmengine keeps loggers and visualizers by name."""
    cfg.experiment_name = cfg.visualizer.name = f"{Path(cfg.work_dir).name}_{next(_numbers)}"
    return RUNNERS.build(cfg)


def mim(*args, cwd, timeout=240):
    """Runs mim as a user would, and fails with its output."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(MIM), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    return done.returncode, done.stdout + done.stderr
