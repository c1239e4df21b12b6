_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime_seg.py"]
model = dict(
    type="VimEncoderDecoder",
    backbone=dict(
        type="VimBackbone",
        arch="vim_tiny_patch16_224",
        img_size=512,
        drop_path_rate=0.0,
        # weights to start from, e.g. an official Vim; empty for none
        init_cfg=dict(type="Pretrained", checkpoint=""),
    ),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
)
