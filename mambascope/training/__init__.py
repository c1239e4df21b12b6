"""Training: the Lightning module, its callbacks and the command line.

- ``module``: :class:`~mambascope.training.module.ClassifierModule`, both stages or one. ``eye_module``:
  :class:`~mambascope.eye.module.EyeModule` for MambaEye. ``base``: what they share. ``args``: typed options.
- ``optim``, ``rng``: optimizer and schedule as functions of the step, randomness as a function of (seed, epoch, batch).
- ``ema``: average of the weights. ``checkpointing``: saving, signals, losses that are no numbers. ``io``: atomic files.
- ``export``: final weights. ``progress``, ``loggers``: screen, CSV, TensorBoard, Weights & Biases.
- ``runs``, ``cli``: run directories and ``tools/train_cls.py``.
"""
