"""Typed groups of the training command's options; they are the sections of the YAML configs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelArgs:
    """Which model, and what it starts from.

    Attributes:
        name: A timm entry of this package, e.g. ``mambascope_tiny_patch16_224`` or ``vim_small_patch16_224``, or one
            of timm's own, e.g. ``deit_tiny_patch16_224`` or ``resnet50``.
        args: Fields of the model's config to change: ``alpha``, ``threshold``, ``drop_path_rate``, ``img_size``, ...;
            of timm's own, the arguments of its entries that are sizes and choices of classifiers, or say where weights
            come from.
        checkpoint: Weights to finetune from: official Vim ``.pth``, our ``.ckpt`` or ``.safetensors``, a folder with
            ``model.safetensors``, or shipped weights by name (``scopedigits``). Position tables are resampled to the
            model's resolution.
        strict: Whether tensors of the checkpoint that do not fit are an error, and fields of its config that make
            another meaning of them. Set to false for another number of classes, whose head then starts fresh, or to
            start a model from weights that were trained for, say, another ``fine_cls`` or ``stride``.
    """

    name: str = "mambascope_nano_patch8_64"
    args: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if self.args is None:  # what YAML makes of `args:` with nothing after it
            object.__setattr__(self, "args", {})


@dataclass(frozen=True)
class OptimizerArgs:
    """AdamW through timm, without weight decay on what the model names and on one-dimensional parameters.

    Attributes:
        lr: Peak learning rate.
        lr_batch: Global batch that ``lr`` is meant for; the rate grows linearly with the real one (batch of a process x
            processes x accumulation). ``null`` takes ``lr`` as it is.
        weight_decay: Weight decay.
        betas: Momentum terms.
        eps: Denominator's floor.
        layer_decay: Factor by which each layer's rate is below the next one's; ``null`` for none.
    """

    lr: float = 5e-4
    lr_batch: int | None = 512
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float | None = None


@dataclass(frozen=True)
class ScheduleArgs:
    """Learning rate over the optimizer steps.

    Attributes:
        name: ``cosine`` decay to ``min_lr`` at the last step, or ``constant``.
        warmup_epochs: Linear warm-up, in epochs; fractions are accepted.
        warmup_lr: Rate at the first step of the warm-up.
        min_lr: Rate at the end.
    """

    name: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5


@dataclass(frozen=True)
class MixArgs:
    """Mixup and CutMix by timm; the same mixed image and soft target serve both stages.

    Attributes:
        mixup: Mixup alpha, 0 for none.
        cutmix: CutMix alpha, 0 for none.
        prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix where both are active.
        mode: One mix per ``batch``, per ``pair`` of images or per image (``elem``).
        off_epochs: Number of last epochs without mixing.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: Literal["batch", "pair", "elem"] = "batch"
    off_epochs: int = 0


@dataclass(frozen=True)
class RunArgs:
    """Where a run lives and what it leaves behind.

    Attributes:
        name: Run directory below ``root``; by default the config's name, numbered if it is taken.
        root: Directory of all runs.
        loggers: Any of ``csv``, ``tensorboard`` and ``wandb``.
        wandb_project: Project for Weights & Biases.
        report: Whether to write the report folder and print the result table at the end.
    """

    name: str | None = None
    root: str = "runs"
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = field(default_factory=lambda: ["csv", "tensorboard"])
    wandb_project: str = "mambascope"
    report: bool = True
