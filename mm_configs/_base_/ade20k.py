# ADE20K at its usual place. Batch 16 in all, written for 8 processes with 2 images each.
data_root = "data/ade/ADEChallengeData2016"
data_help = """ADE20K belongs at data/ade/ADEChallengeData2016:
  images/training/*.jpg       annotations/training/*.png
  images/validation/*.jpg     annotations/validation/*.png
Get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu (scene parsing benchmark, 150 classes) and unpack it
in data/ade. A stand-in of the same layout, to try the command:
  python tools/make_scopedigits.py --task seg --ade-ids --out data/ade/ADEChallengeData2016"""
crop_size = (512, 512)
train_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomResize", scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="LoadAnnotations", reduce_zero_label=True),  # after Resize: scored at the original size
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="ADE20KDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="ADE20KDataset",
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"])]
test_evaluator = val_evaluator
