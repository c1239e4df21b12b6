"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from mambascope.training.args import OptimizerArgs, ScheduleArgs


def scaled_lr(args: OptimizerArgs, global_batch: int) -> float:
    """Peak learning rate for the images of one optimizer step over all processes."""
    return args.lr if args.lr_batch is None else args.lr * global_batch / args.lr_batch


def build_optimizer(model: nn.Module, args: OptimizerArgs, lr: float, fused: bool = True) -> Optimizer:
    """AdamW with timm's parameter groups (``no_weight_decay`` and ``group_matcher`` of the model).

    Args:
        model: The model.
        args: Options.
        lr: Peak rate, already scaled.
        fused: One kernel for all parameters. Must be off where gradients are unscaled before clipping (fp16).

    Raises:
        ValueError: If an option is out of range.
    """
    if not lr > 0:
        raise ValueError(f"optimizer.lr must be above 0, got {args.lr!r}")
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        raise ValueError(f"optimizer.layer_decay must lie in (0, 1] or be null, got {args.layer_decay!r}")
    if args.weight_decay < 0:
        raise ValueError(f"optimizer.weight_decay must be >= 0, got {args.weight_decay!r}")
    options: dict[str, Any] = {"fused": True} if fused else {}
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=lr,
        weight_decay=args.weight_decay,
        layer_decay=args.layer_decay,
        betas=tuple(args.betas),
        eps=args.eps,
        **options,
    )


def build_schedule(
    optimizer: Optimizer, args: ScheduleArgs, lr: float, total_steps: float, epoch_steps: float
) -> Scheduler:
    """timm's cosine schedule with linear warm-up, to be updated at every optimizer step.

    Its rates follow from the step number alone, so a resumed run needs no state of it: it follows the schedule that its
    options describe, also when they ask for more epochs than before.

    Args:
        optimizer: Whose rates are scheduled.
        args: Options.
        lr: Peak rate, already scaled.
        total_steps: Optimizer steps of the whole training; infinite for an endless one.
        epoch_steps: Optimizer steps per epoch.

    Raises:
        ValueError: If an option is out of range.
    """
    for name in ("warmup_epochs", "warmup_lr", "min_lr"):
        if getattr(args, name) < 0:
            raise ValueError(f"schedule.{name} must be >= 0, got {getattr(args, name)!r}")
    for group in optimizer.param_groups:
        group["initial_lr"] = lr  # a restored optimizer brings the old one
    warmup = round(args.warmup_epochs * epoch_steps)
    if warmup >= total_steps:
        warmup = int(total_steps // 2)
        rank_zero_warn(
            f"schedule.warmup_epochs is longer than the training of {total_steps} steps; warming up for {warmup} steps"
        )
    endless = args.name == "constant" or not math.isfinite(total_steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=10**12 if endless else max(1, int(total_steps)),  # the start of a very long cosine is flat
        lr_min=0.0 if endless else args.min_lr,
        warmup_t=warmup,
        warmup_lr_init=args.warmup_lr,
        t_in_epochs=False,
    )
