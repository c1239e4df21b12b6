"""mmengine's runner, also on machines without a GPU, and with a word on where data belongs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mambascope.mm.backbone import EncoderBackbone
from mambascope.mm.dense import UnpaddedMixin


def data_folders(dataset: Any) -> Iterator[Path]:
    """Files and folders that a data set's config needs, through any wrappers around it."""
    if not isinstance(dataset, Mapping):
        return
    if "dataset" in dataset:
        yield from data_folders(dataset["dataset"])
    for part in dataset.get("datasets", ()):
        yield from data_folders(part)
    root = dataset.get("data_root") or ""
    names = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    yield from (Path(root) / name for name in names if isinstance(name, str) and name)


def check_data(cfg: Mapping, loaders: tuple[str, ...]) -> None:
    """Checks that the data of some loaders is there before anything is built.

    Args:
        cfg: The whole config; its ``data_help`` says what belongs where.
        loaders: Names such as ``train_dataloader``.

    Raises:
        FileNotFoundError: The message names what is missing and says what to put where.
    """
    missing = []
    for loader in loaders:
        section = cfg.get(loader)
        found = data_folders(section.get("dataset")) if isinstance(section, Mapping) else ()
        missing += [path for path in found if not path.exists() or (path.is_dir() and not any(path.iterdir()))]
    if missing:
        what = "".join(f"\n  {path}" for path in dict.fromkeys(missing))
        raise FileNotFoundError(
            f"data is missing (looked from {os.getcwd()}):{what}\n{str(cfg.get('data_help') or '').strip()}"
        )


def misfit(checkpoint: Any, error: RuntimeError) -> str:
    """One line for PyTorch's list of everything that does not fit."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    shown = " ".join(lines)
    shown = shown if len(shown) < 300 else f"{shown[:300]}..."
    return f"checkpoint {checkpoint} belongs to another model than this config's (arch, classes or heads): {shown}"


@RUNNERS.register_module()
class ScopeRunner(Runner):
    """mmengine's ``Runner`` that checks the data first and also runs on CPU: gloo, plain batch norm, bfloat16."""

    _whole = False

    def build_model(self, model: Any) -> nn.Module:
        """Builds the model, with a word on models that do not tell our backbones where padding begins."""
        built = super().build_model(model)
        parts = list(built.modules())
        ours, unpadded = (any(isinstance(m, kind) for m in parts) for kind in (EncoderBackbone, UnpaddedMixin))
        if ours and not unpadded:
            print_log(
                f"{type(built).__name__} takes padding for a part of the image: results depend on the other images of "
                "a batch. VimEncoderDecoder, ScopeEncoderDecoder, VimCascadeRCNN and ScopeCascadeRCNN read images "
                "without it, as does every model with mambascope.mm.dense.UnpaddedMixin as its first base class",
                logger="current",
                level=logging.WARNING,
            )
        return built

    def train(self) -> nn.Module:
        """Trains, after a check of the data."""
        check_data(self.cfg, ("train_dataloader", "val_dataloader"))
        return super().train()

    def val(self) -> dict:
        """Validates, after a check of the data."""
        check_data(self.cfg, ("val_dataloader",))
        self._whole = True
        return super().val()

    def test(self) -> dict:
        """Tests, after a check of the data."""
        check_data(self.cfg, ("test_dataloader",))
        self._whole = True
        return super().test()

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", strict: bool = False, **kwargs: Any) -> Any:
        """Loads a checkpoint; for testing and resuming every weight must fit, where mmengine would only warn.

        Raises:
            ValueError: If the checkpoint does not exist or belongs to another model.
        """
        if "://" not in str(filename) and not Path(filename).is_file():
            raise ValueError(f"checkpoint {filename} does not exist")
        try:
            return super().load_checkpoint(filename, map_location, strict or self._whole or self._resume, **kwargs)
        except RuntimeError as error:
            raise ValueError(misfit(filename, error)) from None

    def setup_env(self, env_cfg: dict) -> None:
        """Starts gloo where there is no GPU: mmengine would ask CUDA for a device whatever the backend."""
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            if self.launcher != "pytorch":
                raise ValueError(f"without a GPU the launcher must be 'pytorch', got {self.launcher!r}")
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """On CPU: DDP without device ids, and BN instead of SyncBN, which exists on GPUs only."""
        if not torch.cuda.is_available():
            model = revert_sync_batchnorm(model)
            if self.distributed:
                unused = self.cfg.get("find_unused_parameters", False)
                own = {"broadcast_buffers": False, "find_unused_parameters": unused, "device_ids": None}
                model_wrapper_cfg = {"type": "MMDistributedDataParallel", **own, **(model_wrapper_cfg or {})}
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """On CPU ``--amp`` means bfloat16 without a loss scale."""
        amp = isinstance(optim_wrapper, Mapping) and optim_wrapper.get("type") == "AmpOptimWrapper"
        if amp and not torch.cuda.is_available():
            print_log("mixed precision on CPU: bfloat16, no loss scale", logger="current")
            kept = {k: v for k, v in optim_wrapper.items() if k not in ("loss_scale", "dtype", "use_fp64")}
            optim_wrapper = {**kept, "type": "CpuAmpOptimWrapper"}
        return super().build_optim_wrapper(optim_wrapper)
