_base_ = ["_base_/cascade.py", "_base_/coco_lsj.py", "_base_/schedule_380k.py", "_base_/runtime_det.py"]
model = dict(
    type="VimCascadeRCNN",
    backbone=dict(
        type="VimBackbone",
        arch="vim_tiny_patch16_224",
        img_size=1024,
        drop_path_rate=0.0,
        # weights to start from, e.g. an official Vim; empty for none
        init_cfg=dict(type="Pretrained", checkpoint=""),
    ),
    neck=dict(in_channels=[192] * 4),
)
