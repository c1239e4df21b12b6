"""Training: the Lightning module, its callbacks and the command line.

- ``base``: what the Lightning modules of all models share. ``module``: image classifiers, and those with one stage.
  ``scope_module``: those with two. ``args``: typed options.
- ``optim``, ``rng``: optimizer and schedule as functions of the step, randomness as a function of (seed, epoch, batch).
- ``ema``: average of the weights. ``checkpointing``: saving, signals, losses that are no numbers. ``io``: atomic files.
- ``export``: final weights. ``progress``, ``loggers``: screen, CSV, TensorBoard, Weights & Biases.
- ``runs``, ``cli``: run directories and ``tools/train_cls.py``.
"""
