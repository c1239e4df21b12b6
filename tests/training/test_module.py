"""The Lightning module: steps, schedule, phases, metrics, precisions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import nn

from mambascope.data import ScopeDigitsDataModule
from mambascope.data.scopedigits_config import ScopeDigitsConfig
from mambascope.evaluation.collect import collect
from mambascope.evaluation.sweep import calibration_error, sweep
from mambascope.models.cost import stage_macs
from mambascope.models.losses import ClassificationLoss, ScopeLoss
from mambascope.models.states import StageLogits
from mambascope.training.args import MixArgs, ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.checkpointing import RunCheckpoint
from mambascope.training.ema import EmaWeights
from mambascope.training.module import ClassifierModule
from mambascope.training.rng import step_seed
from mambascope.training.scope_module import ScopeModule
from tests.conftest import FineCalls

SMALL = {"img_size": 32, "embed_dim": 16, "depth": 2, "d_state": 4, "num_classes": 10, "alpha": 0.5}
VIM = {key: value for key, value in SMALL.items() if key != "alpha"}


def module(args=None, name="mambascope_nano_patch8_64", **options):
    options.setdefault("optimizer", OptimizerArgs(lr=1e-3, lr_batch=None))
    options.setdefault("schedule", ScheduleArgs(warmup_epochs=0.5))
    torch.manual_seed(0)
    kind, sizes = (ScopeModule, SMALL) if "scope" in name else (ClassifierModule, VIM)
    return kind(ModelArgs(name, {**sizes, **(args or {})}), **options)


def data(train=48, val=24, batch=4):
    return ScopeDigitsDataModule(train, val, ScopeDigitsConfig(size=32), batch_size=batch, val_batch_size=10)


def trainer(tmp_path, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(tmp_path),
    }
    return Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class Spy(Callback):
    """Notes what each step used."""

    def __init__(self):
        self.lr, self.alpha, self.loss, self.fine_calls = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.alpha.append(getattr(pl_module.model, "alpha", None))
        self.loss.append(outputs["loss"].item())

    def on_validation_start(self, trainer, pl_module):
        if hasattr(pl_module.model, "forward_fine"):
            self._counter = FineCalls(pl_module.model)

    def on_validation_end(self, trainer, pl_module):
        if hasattr(pl_module.model, "forward_fine"):
            self.fine_calls.append(self._counter.images)
            del pl_module.model.forward_fine


def test_schedule_and_phases(tmp_path):
    spy, net = (
        Spy(),
        module(schedule=ScheduleArgs(warmup_epochs=0.5, warmup_lr=1e-5, min_lr=1e-4), full_refine_epochs=1),
    )
    trainer(tmp_path, spy).fit(net, data())
    steps, warmup = 24, 6
    expected = [1e-5 + t * (1e-3 - 1e-5) / warmup for t in range(warmup)]
    expected += [1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * t / steps)) for t in range(warmup, steps)]
    assert spy.lr == pytest.approx(expected)
    assert spy.alpha == [1.0] * 12 + [0.5] * 12


def test_rate_follows_the_global_batch(tmp_path):
    spy = Spy()
    net = module(optimizer=OptimizerArgs(lr=5e-4, lr_batch=512), schedule=ScheduleArgs("constant", warmup_epochs=0))
    trainer(tmp_path, spy, max_epochs=1, accumulate_grad_batches=3).fit(net, data())
    assert spy.lr == pytest.approx([5e-4 * 12 / 512] * 12)


def test_groups_without_weight_decay_and_layer_decay(tmp_path):
    net = module(optimizer=OptimizerArgs(lr=1e-3, lr_batch=None, weight_decay=0.1, layer_decay=0.5))
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(net, data())
    names = {id(p): n for n, p in net.model.named_parameters()}
    decay, scale = {}, {}
    for group in fit.optimizers[0].param_groups:
        for p in group["params"]:
            decay[names[id(p)]], scale[names[id(p)]] = group["weight_decay"], group["lr_scale"]
    assert decay.keys() == dict(net.model.named_parameters()).keys()
    for name, p in net.model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        none = p.ndim == 1 or last in ("cls_token", "pos_embed", "pos_embed_coarse", "A_log", "A_b_log", "D", "D_b")
        assert decay[name] == (0.0 if none else 0.1), name
    assert scale["head.weight"] == 1.0
    assert scale["patch_embed.proj.weight"] < scale["layers.0.norm.weight"] < scale["layers.1.norm.weight"] <= 1.0


class HingeLoss(nn.Module):
    """A loss of a user's own, which says its value alone."""

    def __init__(self, margin: float = 1.0):
        super().__init__()
        self.margin = margin

    def forward(self, output, target):
        logits = output.fine if isinstance(output, StageLogits) else output
        return F.multi_margin_loss(logits, target, margin=self.margin)


@pytest.mark.parametrize("name", ["mambascope_nano_patch8_64", "vim_nano_patch8_64"])
def test_any_module_can_be_the_loss(tmp_path, name):
    spy, net = Spy(), module(name=name, loss=HingeLoss(0.5))
    fit = trainer(tmp_path, spy, max_epochs=1, log_every_n_steps=1)
    fit.fit(net, data())
    assert net.criterion.margin == 0.5
    assert float(fit.callback_metrics["train/loss"]) == pytest.approx(spy.loss[-1])
    parts = {key for key in fit.callback_metrics if key.startswith("train/")} - {"train/lr", "train/alpha"}
    assert parts == {"train/loss"}


def test_the_loss_by_default_and_its_parts(tmp_path):
    net, fit = module(), trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    fit.fit(net, data(train=8))
    assert isinstance(net.criterion, ScopeLoss)
    parts = {"train/loss", "train/fine_ce", "train/coarse_kl", "train/coarse_ce", "train/alpha", "train/lr"}
    assert {key for key in fit.callback_metrics if key.startswith("train/")} == parts
    assert {"train/fine_ce", "train/coarse_kl"} <= fit.progress_bar_metrics.keys()
    assert isinstance(module(name="vim_nano_patch8_64").criterion, ClassificationLoss)


def test_validation_metrics_equal_the_offline_sweep(tmp_path):
    net, images, spy = module(), data(), Spy()
    record = collect(net.model, images.val_dataloader(), progress=False).record
    net.model.threshold = float(np.quantile(record.confidence, 0.3))
    fit = trainer(tmp_path, spy)
    fit.validate(net, images, verbose=False)
    logged = {key: float(value) for key, value in fit.callback_metrics.items()}
    curve = sweep(record, thresholds=[0.0, net.model.threshold, 1.0])
    for stage, at in (("coarse", 0), ("dynamic", 1), ("fine", 2)):
        assert logged[f"val/{stage}_top1"] == pytest.approx(curve.top1[at])
        assert logged[f"val/{stage}_top5"] == pytest.approx(curve.top5[at])
    assert logged["val/share_refined"] == pytest.approx(curve.share_refined[1])
    assert 0 < logged["val/share_refined"] < 1
    expected = calibration_error(record.confidence, record.coarse_correct)
    assert logged["val/gate_ece"] == pytest.approx(expected, abs=1e-5)
    cost = net.model.config
    share = float(curve.share_refined[1])
    assert logged["val/gflops"] == pytest.approx(stage_macs(cost).gflops(share), rel=1e-5)
    both = stage_macs(cost, convention="both_directions").gflops(share)
    assert logged["val/gflops_both_directions"] == pytest.approx(both, rel=1e-5)
    assert spy.fine_calls == [24]  # each image once, although three results are reported


def test_validation_uses_the_models_alpha_in_every_phase(tmp_path):
    net = module(full_refine_epochs=5)
    seen = []
    forward = net.model.forward_fine

    def spy(x, coarse, alpha=None):
        seen.append((net.training, alpha))
        return forward(x, coarse, alpha)

    net.model.forward_fine = spy
    trainer(tmp_path, max_epochs=1).fit(net, data())
    assert set(seen) == {(True, None), (False, 0.5)}
    assert net.model.alpha == 1.0
    assert net.describe()["config"]["alpha"] == 0.5


def test_one_stage_model(tmp_path):
    fit = trainer(tmp_path, max_epochs=1)
    net = module(name="vim_nano_patch8_64")
    fit.fit(net, data())
    keys = {"val/top1", "val/top5", "val/loss", "val/gflops", "val/gflops_both_directions"}
    assert keys <= fit.callback_metrics.keys()
    assert net.monitor == "val/top1"


class GradientSize(Callback):
    """Notes the norm and the largest entry of the clipped gradients."""

    def __init__(self):
        self.norm, self.largest = [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        if grads:
            self.norm.append(float(torch.stack([g.norm() for g in grads]).norm()))
            self.largest.append(max(float(g.abs().max()) for g in grads))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.1), ("value", 1e-3)])
def test_precisions_with_clipping(tmp_path, precision, algorithm, limit):
    sizes, net = GradientSize(), module()
    clip = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    fit = trainer(tmp_path, sizes, max_epochs=1, precision=precision, **clip)
    fit.fit(net, data(train=16))
    assert fit.optimizers[0].defaults["fused"]
    logged = sizes.norm if algorithm == "norm" else sizes.largest
    assert len(logged) >= 3
    assert max(logged) == pytest.approx(limit, rel=0.01)
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in net.parameters())


def test_accumulated_batches_equal_one_large(tmp_path):
    nets = []
    for batch, accumulate in ((8, 1), (2, 4)):
        net = module(optimizer=OptimizerArgs(lr=1e-2, lr_batch=None))
        fit = trainer(tmp_path, max_epochs=1, accumulate_grad_batches=accumulate)
        fit.fit(net, data(train=32, batch=batch))
        assert fit.global_step == 4
        nets.append(net)
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


def test_validation_between_accumulated_batches_is_refused(tmp_path):
    options = {"accumulate_grad_batches": 4, "val_check_interval": 6, "enable_checkpointing": True}
    with pytest.raises(ValueError, match=r"every 6 batches, which must be a multiple of .* = 4"):
        trainer(tmp_path, RunCheckpoint(), **options).fit(module(), data())


def test_gradient_checkpointing_and_compile_change_nothing(tmp_path):
    losses = []
    for options in ({}, {"grad_checkpointing": True}, {"compile": "eager"}):
        spy = Spy()
        net = module({"drop_path_rate": 0.3}, **options)
        trainer(tmp_path, spy, EmaWeights(0.9), max_epochs=1, limit_train_batches=3, limit_val_batches=1).fit(
            net, data()
        )
        assert not any("_orig_mod" in key for key in net.state_dict())
        losses.append(spy.loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_mixing_is_a_function_of_the_step(tmp_path):
    batch = torch.randn(4, 3, 32, 32), torch.arange(4)
    net = module(mix=MixArgs(mixup=0.8, cutmix=1.0))
    net._trainer = trainer(tmp_path)

    def mixed(epoch, index):
        from mambascope.training.rng import seed_step

        seed_step(0, epoch, index, 0)
        return net._mixed(batch[0].clone(), batch[1])

    x, y = mixed(0, 3)
    again = mixed(0, 3)
    torch.testing.assert_close(x, again[0], rtol=0, atol=0)
    assert y.shape == (4, 10)
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    assert not torch.equal(y, mixed(0, 4)[1])
    with pytest.raises(ValueError, match=r"data\.batch_size must be even with Mixup or CutMix, got 3"):
        net._mixed(batch[0][:3].clone(), batch[1][:3])
    net.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True  # only the rest of an epoch may be odd
    odd, target = net._mixed(batch[0][:3].clone(), batch[1][:3])
    assert torch.equal(odd, batch[0][:3])
    assert torch.equal(target, batch[1][:3])


def test_mixing_can_stop_before_the_end(tmp_path):
    net = module(mix=MixArgs(mixup=0.8, off_epochs=1))
    net._trainer = trainer(tmp_path, max_epochs=1)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    assert net._mixed(x, y)[1] is y


def test_seeds_differ_in_every_coordinate():
    seeds = [step_seed(*c) for c in np.ndindex(2, 3, 4, 2)]
    assert len(set(seeds)) == len(seeds)
    assert step_seed(1, 2, 3, 0) == step_seed(1, 2, 3, 0)


def test_finetuning_at_another_resolution(tmp_path, capsys):
    from mambascope.models.checkpoint import CheckpointError, save_safetensors

    source = module()
    save_safetensors(source.model, tmp_path / "start.safetensors")
    larger = ModelArgs("mambascope_nano_patch8_64", {**SMALL, "img_size": 64}, str(tmp_path / "start.safetensors"))
    net = ScopeModule(larger)
    assert net.model.pos_embed.shape[1] == 65
    assert torch.equal(net.model.layers[0].mixer.in_proj.weight, source.model.layers[0].mixer.in_proj.weight)
    assert "resampled    2" in capsys.readouterr().out
    fewer = {**SMALL, "num_classes": 4}
    with pytest.raises(CheckpointError, match=r"head\.weight is \[10, 16\] in the file and \[4, 16\] in the model"):
        ScopeModule(ModelArgs(larger.name, fewer, larger.checkpoint))
    ScopeModule(ModelArgs(larger.name, fewer, larger.checkpoint, strict=False))


def test_what_the_data_say_about_the_model():
    net = ScopeModule(ModelArgs(args={"depth": 1}), data_facts={"num_classes": 4, "img_size": (32, 48)})
    assert (net.model.num_classes, net.model.config.image_hw) == (4, (32, 48))
    unchanged = ScopeModule(ModelArgs(args={"depth": 1, "num_classes": 7}), data_facts={"num_classes": 4})
    assert unchanged.model.num_classes == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"net": ModelArgs("resnet51")}, "net.name must be one of .*mambascope_tiny"),
        ({"net": ModelArgs(args={"alpah": 1})}, "unknown model argument alpah"),
        ({"net": ModelArgs(args={"num_classes": 0})}, "num_classes must be at least 2"),
        ({"net": ModelArgs("vim_nano_patch8_64")}, "ClassifierModule trains vim_nano_patch8_64"),
        ({"net": ModelArgs(args={"score_topk": "abc"})}, "score_topk must be a positive integer, got 'abc'"),
        ({"net": ModelArgs(args={"score_layers": 2.5})}, "score_layers must be a positive integer, got 2.5"),
        ({"mix": MixArgs(mixup=-1)}, "mix.mixup must be >= 0"),
        ({"mix": MixArgs(prob=3)}, r"mix.prob must lie in \[0, 1\]"),
        ({"compile": "nonsense"}, "compile must be true, false or one of .*inductor.*, got 'nonsense'"),
        ({"full_refine_epochs": -1}, "full_refine_epochs must be >= 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ScopeModule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": OptimizerArgs(lr=0.0)}, "optimizer.lr must be above 0"),
        ({"optimizer": OptimizerArgs(layer_decay=1.5)}, r"optimizer.layer_decay must lie in \(0, 1\]"),
        ({"schedule": ScheduleArgs(min_lr=-1.0)}, "schedule.min_lr must be >= 0"),
    ],
)
def test_bad_options_of_the_optimizer_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(module(**options), data())


def test_warmup_longer_than_the_training_is_shortened(tmp_path):
    spy = Spy()
    with pytest.warns(UserWarning, match="warming up for 6 steps"):
        trainer(tmp_path, spy, max_epochs=1).fit(module(schedule=ScheduleArgs(warmup_epochs=9)), data())
    assert spy.lr.index(max(spy.lr)) == 5
