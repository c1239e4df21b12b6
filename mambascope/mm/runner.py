"""mmengine's runner, also on machines without a GPU, and with a word on where data belongs."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_distributed, is_main_process
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from mambascope._names import printable
from mambascope.data.errors import DataError, worker_failure
from mambascope.mm.backbone import EncoderBackbone
from mambascope.mm.data_checks import check_data, check_masks, plain_configs
from mambascope.mm.dense import UnpaddedMixin
from mambascope.mm.transforms import name_annotations, survey_images
from mambascope.mm.weights import local_file
from mambascope.models.checkpoint import CheckpointError


def misfit(checkpoint: Any, error: RuntimeError) -> str:
    """One line for PyTorch's list of everything that does not fit."""
    lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    shown = " ".join(lines)
    shown = shown if len(shown) < 300 else f"{shown[:300]}..."
    return f"checkpoint {checkpoint} belongs to another model than this config's (arch, classes or heads): {shown}"


@contextmanager
def one_line() -> Iterator[None]:
    """Errors that users can mend, in one line: also those of loader processes and of batch normalisation."""
    try:
        yield
    except DataError as error:
        text = str(error)
        if text.startswith("Caught "):  # PyTorch puts the loader process's traceback before it
            text = re.sub(r"^[\w.]+: ", "", text.rstrip().splitlines()[-1])
            raise DataError(text) from None
        raise
    except RuntimeError as error:
        if (failure := worker_failure(error)) is None:
            raise
        raise failure from None
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        raise DataError(
            "batch normalisation of a pooled map cannot be trained with one image: two images per process are needed, "
            "train_dataloader.batch_size=2 or more (and drop_last=True if the last batch of an epoch may hold one)"
        ) from None


def _print_in_one_line() -> None:
    """Lets errors that users can mend end a command with their line instead of a traceback."""
    before = sys.excepthook

    def hook(kind: Any, error: BaseException, trace: Any) -> None:
        if isinstance(error, (DataError, CheckpointError)):
            print(f"error: {printable(str(error))}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


@RUNNERS.register_module()
class ScopeRunner(Runner):
    """mmengine's ``Runner`` that checks the data first and also runs on CPU: gloo, plain batch norm, bfloat16."""

    _whole = False

    def build_model(self, model: Any) -> nn.Module:
        """Builds the model, with a word on models that do not tell our backbones where padding begins."""
        built = super().build_model(model)
        parts = list(built.modules())
        adapted, unpadded = (any(isinstance(m, kind) for m in parts) for kind in (EncoderBackbone, UnpaddedMixin))
        if adapted and not unpadded:
            print_log(
                f"{type(built).__name__} takes padding for a part of the image: results depend on the other images of "
                "a batch. VimEncoderDecoder, ScopeEncoderDecoder, VimCascadeRCNN and ScopeCascadeRCNN read images "
                "without it, as does every model with mambascope.mm.dense.UnpaddedMixin as its first base class",
                logger="current",
                level=logging.WARNING,
            )
        return built

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if sys.excepthook is sys.__excepthook__:
            _print_in_one_line()
        super().__init__(*args, **kwargs)

    def train(self) -> nn.Module:
        """Trains, after a check of the data."""
        with self._attempt():
            check_data(self.cfg, ("train_dataloader", "val_dataloader"))
            return super().train()

    def val(self) -> dict:
        """Validates, after a check of the data."""
        self._whole = True
        with self._attempt():
            check_data(self.cfg, ("val_dataloader",))
            return super().val()

    def test(self) -> dict:
        """Tests, after a check of the data."""
        self._whole = True
        with self._attempt():
            check_data(self.cfg, ("test_dataloader",))
            return super().test()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Errors in one line; a run that could not start leaves no folder behind."""
        try:
            with one_line():
                yield
        except (DataError, CheckpointError):
            began = isinstance(self._train_loop, BaseLoop) and self._train_loop.iter > 0
            if is_main_process() and not began:
                shutil.rmtree(self._log_dir, ignore_errors=True)
                folder = Path(self.work_dir)
                source = Path(self.cfg.filename or f"{self.timestamp}.py")
                dumped = folder / source.name
                if set(folder.iterdir()) <= {dumped} and source.resolve() != dumped.resolve():
                    dumped.unlink(missing_ok=True)
                    folder.rmdir()
            raise

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """mmengine's loader, whose annotations are checked when they are read."""
        try:
            loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except ValueError as error:
            if "need at least one array" not in str(error) or not isinstance(dataloader, Mapping):
                raise
            [(_, dataset), *_] = plain_configs(dataloader["dataset"])
            filters = dict(dataset.get("filter_cfg") or {})
            where = Path(dataset.get("data_root") or "", dataset.get("ann_file") or "")
            raise DataError(f"no image of {where} is left after filter_cfg={filters}") from None
        name_annotations(loader.dataset)
        check_masks(loader.dataset)
        survey_images(loader.dataset)
        return loader

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", strict: bool = False, **kwargs: Any) -> Any:
        """Loads a checkpoint; for testing and resuming every weight must fit, where mmengine would only warn.

        Raises:
            CheckpointError: If the checkpoint does not exist or belongs to another model.
        """
        path = local_file(filename) if "://" in str(filename) else Path(filename)
        if not path.is_file():
            raise CheckpointError(f"checkpoint {filename} does not exist")
        try:
            return super().load_checkpoint(str(path), map_location, strict or self._whole or self._resume, **kwargs)
        except RuntimeError as error:
            raise CheckpointError(misfit(filename, error)) from None

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
                ddp = {"broadcast_buffers": False, "find_unused_parameters": unused, "device_ids": None}
                model_wrapper_cfg = {"type": "MMDistributedDataParallel", **ddp, **(model_wrapper_cfg or {})}
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """On CPU ``--amp`` means bfloat16 without a loss scale."""
        amp = isinstance(optim_wrapper, Mapping) and optim_wrapper.get("type") == "AmpOptimWrapper"
        if amp and not torch.cuda.is_available():
            print_log("mixed precision on CPU: bfloat16, no loss scale", logger="current")
            options = {k: v for k, v in optim_wrapper.items() if k not in ("loss_scale", "dtype", "use_fp64")}
            optim_wrapper = {**options, "type": "CpuAmpOptimWrapper"}
        return super().build_optim_wrapper(optim_wrapper)
