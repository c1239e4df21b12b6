# UPerNet small enough for minutes on a CPU
_loss = dict(
    type="ClassWeightedCrossEntropy",
    class_weight=[0.3, *([1.0] * 10)],  # nine tenths of the pixels are background
)
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size_divisor=16,
    ),
    decode_head=dict(
        type="UPerHead",
        in_channels=[64] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=48,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=_loss,
    ),
    # a linear reading of one map learns the classes long before the fusion of four does, and trains the encoder
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=64,
        in_index=2,
        channels=64,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=None,
        align_corners=False,
        loss_decode=_loss,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
