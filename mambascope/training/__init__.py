"""Training: the Lightning modules, their callbacks and the folders of runs.

- ``base``: what the Lightning modules of all models share. ``module``: image classifiers, and those with one stage.
  ``scope_module``: those with two. ``args``: typed options.
- ``optim``, ``rng``: optimizer and schedule as functions of the step, randomness as a function of (seed, epoch, batch).
- ``ema``: average of the weights. ``checkpointing``: saving, signals, losses that are no numbers. ``io``: atomic files.
- ``export``: final weights. ``limits``: what ends a run. ``progress``, ``loggers``: screen, CSV, TensorBoard, W&B.
- ``runs``: run directories. ``trainings``: trainings that other commands start.
"""
