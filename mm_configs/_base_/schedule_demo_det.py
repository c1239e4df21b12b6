# the detector's steps take longer, and from a classifier it needs fewer of them
_base_ = ["schedule_demo.py"]
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-2, by_epoch=False, begin=0, end=60),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, by_epoch=False, begin=60, end=800),
]
train_cfg = dict(max_iters=800, val_interval=800)
