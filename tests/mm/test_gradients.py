"""Every parameter learns in every step, also in several processes; frozen ones do not."""

import pytest
import torch

from tests.mm.common import scope, vim


@pytest.mark.parametrize(
    "options",
    [
        {"coarse_resize": "bilinear"},
        {"coarse_resize": "learned"},
        {"coarse_resize": "learned", "detail": True},
        {"detail": True, "arch_options": {"stem_width": 12}},
        {"gate": None},
        {"arch_options": {"score_metric": "evidence", "coarse_offsets": True}},
        {"gate": None, "arch_options": {"reuse": "off", "alpha": 1.0}},
        {"gate": None, "out_indices": (0, 1, 2, 3), "arch_options": {"depth": 5}},
        {"arch_options": {"alpha": 0.0}},
    ],
)
@pytest.mark.parametrize("exit_prob", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(), ([(64, 64), (64, 64), (32, 64), (17, 20)],)])
def test_every_parameter_learns_in_every_step(sizes, exit_prob, options):
    model = scope(exit_prob=exit_prob, **options).train()
    torch.manual_seed(3)
    features = model.forward_scope(torch.randn(4, 3, 64, 64), *sizes)
    if model.encoder.alpha:
        assert sizes or float(features.exited.float().mean()) == exit_prob
    loss = sum(m.square().mean() for m in features.maps)
    if model.gate is not None:
        loss = loss + features.gate_logits.square().mean()
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []
    fine_only = model.encoder.pos_embed.grad.abs().max()
    assert (fine_only == 0) == bool(features.exited.all())


@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("make", [scope, vim])
def test_every_parameter_learns_from_any_map(make, level):
    """In mmseg's and mmdet's own models, which read some of the maps and have no loss for the gate."""
    options = {"exit_prob": 1.0} if make is scope else {}
    model = make(out_indices=(0, 1, 2, 3), arch_options={"depth": 5}, **options).train()
    model(torch.randn(2, 3, 64, 64))[level].square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"detail": True, "readout": True, "arch_options": {"stem_width": 12}}])
def test_every_parameter_of_a_plain_vim_learns(options):
    model = vim(**options).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make", [scope, vim])
def test_distributed_steps_in_which_all_exit(make, tmp_path):
    """DDP refuses the second step if the first left a parameter without a gradient."""
    options = {"gate": None, "exit_prob": 1.0} if make is scope else {"out_indices": (0, 1, 2, 3)}
    model = make(arch_options={"depth": 5, "embed_dim": 16}, **options).train()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            sum(m.square().mean() for m in wrapped(torch.randn(2, 3, 32, 32))).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointing_gives_the_same_gradients():
    plain, saving = scope(exit_prob=0.0), scope(exit_prob=0.0, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    grads = []
    for model in (plain, saving):
        sum(m.square().mean() for m in model.train()(x)).backward()
        grads.append(model.encoder.layers[0].mixer.in_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("stem", [0, 12])
def test_frozen_stages_and_norm_eval(stem):
    arch = {"stem_width": stem}
    model = scope(frozen_stages=2, norm_eval=True, norm_cfg={"type": "BN"}, detail=True, arch_options=arch)
    model.train()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any(n.startswith(("encoder.patch_embed", "encoder.layers.0.", "encoder.layers.1.")) for n in trained)
    assert "encoder.pos_embed" not in trained
    assert {"encoder.layers.2.norm.weight", "detail.outs.0.weight"} <= trained
    assert not model.encoder.layers[1].training
    assert model.encoder.layers[2].training
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
