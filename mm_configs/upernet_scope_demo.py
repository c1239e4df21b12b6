_base_ = [
    "_base_/upernet_demo.py",
    "_base_/digits_seg.py",
    "_base_/schedule_demo.py",
    "_base_/runtime_seg.py",
]
default_hooks = dict(checkpoint=dict(interval=1000))
model = dict(
    type="ScopeEncoderDecoder",
    backbone=dict(
        type="ScopeBackbone",
        arch="mambascope_nano_patch8_64",
        arch_options=dict(fine_cls="middle", alpha=0.7),  # CLS in the middle as in the demo's classifier
        img_size=64,
        out_channels=64,
        readout=True,  # the classifier it starts from keeps the class in CLS
        gate=dict(num_classes=11, confidence="entropy", skip_classes=(0,)),  # every image has the background
        threshold=0.5,
        coarse_resize="learned",
        exit_prob=0.5,  # both kinds of features learn equally fast in the few minutes
        init_cfg=dict(type="Pretrained", checkpoint="scopedigits_published"),
    ),
)
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="GateMetric")]
test_evaluator = val_evaluator
