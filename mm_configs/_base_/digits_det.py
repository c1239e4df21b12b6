# ScopeDigits in COCO's layout: ten digits with boxes and masks
data_root = "data/scopedigits_det/"
data_help = """Make the demo's images first:
  python -m mambascope.mm.demo_data"""
_classes = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
_palette = [
    (230, 75, 60),
    (60, 130, 220),
    (45, 170, 100),
    (240, 170, 40),
    (150, 90, 200),
    (30, 180, 190),
    (235, 110, 170),
    (140, 110, 70),
    (170, 200, 60),
    (200, 200, 210),
]
metainfo = dict(classes=_classes, palette=_palette)
train_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),  # also cuts boxes that reach out of the image
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_train2017.json",
        data_prefix=dict(img="train2017/"),
        filter_cfg=dict(filter_empty_gt=False, min_size=0),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    drop_last=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/instances_val2017.json",
        data_prefix=dict(img="val2017/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
