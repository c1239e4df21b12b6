# For comparison: DeiT-Ti from timm (downloads its ImageNet weights; pretrained=False for random ones)
_base_ = ["_base_/upernet.py", "_base_/ade20k.py", "_base_/schedule_160k.py", "_base_/runtime_seg.py"]
model = dict(
    backbone=dict(
        type="TIMMBackbone",
        model_name="deit_tiny_patch16_224",
        pretrained=True,
        img_size=512,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        out_indices=(2, 5, 8, 11),
    ),
    neck=dict(type="MultiLevelNeck", in_channels=[192] * 4, out_channels=192, scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
)
