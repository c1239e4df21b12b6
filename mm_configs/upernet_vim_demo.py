# The plain Vim that the demo is compared with
_base_ = [
    "_base_/upernet_demo.py",
    "_base_/digits_seg.py",
    "_base_/schedule_demo.py",
    "_base_/runtime_seg.py",
]
default_hooks = dict(checkpoint=dict(interval=1000))
model = dict(
    type="VimEncoderDecoder",
    backbone=dict(
        type="VimBackbone",
        arch="vim_nano_patch8_64",
        arch_options=dict(stem_width=32),
        img_size=64,
        out_channels=64,
        readout=True,  # what the classifier that it starts from knows of the whole image
        detail=True,
        init_cfg=dict(type="Pretrained", checkpoint="scopedigits_dense"),
    ),
)
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"])]
test_evaluator = val_evaluator
