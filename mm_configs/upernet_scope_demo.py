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
        # CLS in the middle as in the demo's classifier; the stem sees digits of one and a half patches; cells are
        # ranked by the objects that the gate sees in them, times their contrast
        arch_options=dict(
            fine_cls="middle", alpha=0.5, stem_width=32, score_metric="evidence_contrast", coarse_offsets=True
        ),
        img_size=64,
        out_channels=64,
        readout=True,  # what the classifier that it starts from knows of the whole image
        detail=True,  # the stem's finer maps: small digits' edges lie inside patches
        gate=dict(num_classes=11, confidence="entropy", skip_classes=(0,)),  # every image has the background
        threshold=0.5,
        coarse_resize="learned",
        exit_prob=0.5,  # both kinds of features learn equally fast in the few minutes
        init_cfg=dict(type="Pretrained", checkpoint="scopedigits_dense"),
    ),
)
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="GateMetric")]
test_evaluator = val_evaluator
