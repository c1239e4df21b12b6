_base_ = ["_base_/cascade.py", "_base_/coco_lsj.py", "_base_/schedule_380k.py", "_base_/runtime_det.py"]
model = dict(
    type="ScopeCascadeRCNN",
    backbone=dict(
        type="ScopeBackbone",
        arch="mambascope_small_patch16_224",
        img_size=1024,
        drop_path_rate=0.05,
        gate=dict(num_classes=80),
        threshold=0.8,
        exit_prob=0.25,
        # weights to start from: a classifier of this package or an official Vim; empty for none
        init_cfg=dict(type="Pretrained", checkpoint=""),
    ),
    neck=dict(in_channels=[384] * 4),
)
val_evaluator = [*_base_.val_evaluator, dict(type="GateMetric")]
test_evaluator = val_evaluator
