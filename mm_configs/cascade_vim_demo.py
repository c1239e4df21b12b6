# The plain Vim that the demo is compared with
_base_ = [
    "_base_/cascade_demo.py",
    "_base_/digits_det.py",
    "_base_/schedule_demo_det.py",
    "_base_/runtime_det.py",
]
default_hooks = dict(checkpoint=dict(interval=800))
model = dict(
    type="VimCascadeRCNN",
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
val_evaluator = [
    dict(
        type="CocoMetric",
        ann_file="data/scopedigits_det/annotations/instances_val2017.json",
        metric=["bbox", "segm"],
        format_only=False,
    )
]
test_evaluator = val_evaluator
