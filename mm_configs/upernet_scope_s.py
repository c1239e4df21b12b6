_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime_seg.py"]
model = dict(
    type="ScopeEncoderDecoder",
    backbone=dict(
        type="ScopeBackbone",
        arch="mambascope_small_patch16_224",
        img_size=512,
        drop_path_rate=0.05,
        gate=dict(num_classes=150),
        threshold=0.8,
        exit_prob=0.25,
        # weights to start from: a classifier of this package or an official Vim; empty for none
        init_cfg=dict(type="Pretrained", checkpoint=""),
    ),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)
val_evaluator = [*_base_.val_evaluator, dict(type="GateMetric")]
test_evaluator = val_evaluator
