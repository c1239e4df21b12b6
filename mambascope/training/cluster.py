"""Slurm: whether ``srun`` started this process."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment


def slurm_plugins() -> list[Any]:
    """Lightning's plugin for the place of this process among the job's, where Lightning's own choice would be wrong.

    Lightning takes any process of a job for one that ``srun`` started, and waits for the others. Within ``srun`` it
    would answer SIGUSR1 in the middle of a step; here that is a signal to stop, and the job script requeues.

    Raises:
        ValueError: If ``srun`` started several tasks in a way that Lightning does not support.
    """
    if TorchElasticEnvironment.detect() or "SLURM_NTASKS" not in os.environ:
        return []
    if "SLURM_STEP_ID" not in os.environ:  # only srun sets it
        return [LightningEnvironment()]
    if not SLURMEnvironment.detect():
        return []
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise ValueError(str(error)) from None
