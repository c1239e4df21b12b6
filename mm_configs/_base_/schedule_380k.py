# Cascade Mask R-CNN on COCO: AdamW, linear decay (MambaScope Appendix A, as Vim)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor="LayerDecayConstructor",
    paramwise_cfg=dict(layer_decay_rate=0.92),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=250),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=250, end=380000),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=380000, val_interval=20000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
