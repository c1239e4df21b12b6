# Cascade Mask R-CNN small enough for minutes on a CPU: lean heads, few proposals, patches of 8 pixels
_base_ = ["cascade.py"]
_strides = [2, 4, 8, 16]
_head = dict(
    type="ConvFCBBoxHead",
    num_shared_fcs=1,
    in_channels=32,
    fc_out_channels=64,
    roi_feat_size=3,
    num_classes=10,
    reg_class_agnostic=True,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
)
model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    neck=dict(in_channels=[64] * 4, out_channels=32, num_outs=4),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=[2, 4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(output_size=3, sampling_ratio=2),
            out_channels=32,
            featmap_strides=_strides,
            finest_scale=14,
        ),
        bbox_head=[
            dict(
                **_head,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[std, std, 2 * std, 2 * std],
                ),
            )
            for std in (0.1, 0.05, 0.033)
        ],
        mask_roi_extractor=dict(
            roi_layer=dict(output_size=7, sampling_ratio=1), out_channels=32, featmap_strides=_strides, finest_scale=14
        ),
        mask_head=dict(num_convs=1, roi_feat_size=7, in_channels=32, conv_out_channels=32, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=50),
        rcnn=[
            dict(
                assigner=dict(
                    type="MaxIoUAssigner",
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type="RandomSampler", num=20, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=14,
                pos_weight=-1,
                debug=False,
            )
            for iou in (0.5, 0.6, 0.7)
        ],
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=50), rcnn=dict(max_per_img=20)),
)
