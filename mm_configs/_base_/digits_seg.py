# ScopeDigits in ADE20K's layout: background and ten digits
data_root = "data/scopedigits_seg"
data_help = """Make the demo's images first:
  python -m mambascope.mm.demo_data"""
_classes = ("background", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
_palette = [
    [40, 40, 46],
    [230, 75, 60],
    [60, 130, 220],
    [45, 170, 100],
    [240, 170, 40],
    [150, 90, 200],
    [30, 180, 190],
    [235, 110, 170],
    [140, 110, 70],
    [170, 200, 60],
    [200, 200, 210],
]
metainfo = dict(classes=_classes, palette=_palette)
train_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadAnyImage"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        data_root=data_root,
        metainfo=metainfo,
        reduce_zero_label=True,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
