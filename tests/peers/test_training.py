"""Training with token reduction: the teacher, the methods' terms, measured shares, files."""

import copy

import pytest
import timm
import torch
import yaml
from lightning.pytorch import Callback

import mambascope
from mambascope.models import save_safetensors
from mambascope.models.cost import stage_macs
from mambascope.models.losses import cross_entropy
from mambascope.peers.cost import scan_share
from mambascope.peers.loss import ReductionLoss
from mambascope.peers.module import ReducedModule, TeacherArgs
from mambascope.peers.teacher import Teacher
from mambascope.training.args import ModelArgs, OptimizerArgs, ScheduleArgs
from mambascope.training.ema import EmaWeights
from tests.training.helpers import tiny, train
from tests.training.test_module import data, trainer

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 4, "d_state": 4, "num_classes": 10}
DYVM = {"name": "dyvm", "keep": 0.7}
MEETO = {"name": "r_meeto", "r": 10}


@pytest.fixture
def vim(tmp_path):
    """Weights of a plain Vim."""
    torch.manual_seed(5)
    save_safetensors(timm.create_model("vim_nano_patch8_64", **SMALL), tmp_path / "vim.safetensors")
    return str(tmp_path / "vim.safetensors")


def module(reduction, checkpoint=None, teacher=TeacherArgs(), seed=0):  # noqa: B008
    torch.manual_seed(seed)
    net = ModelArgs("vim_nano_patch8_64", {**SMALL, "reduction": reduction}, checkpoint)
    return ReducedModule(
        net, teacher=teacher, optimizer=OptimizerArgs(lr=1e-3, lr_batch=None), schedule=ScheduleArgs(warmup_epochs=0.5)
    )


class Logged(Callback):
    """Collects what was logged in training."""

    def __init__(self):
        self.names = set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.names |= set(trainer.callback_metrics)


@pytest.mark.parametrize(
    ("reduction", "teacher", "terms"),
    [
        ({"name": "hidden_align", "keep": 0.6}, TeacherArgs(), {"ce"}),
        (MEETO, TeacherArgs(kl_weight=0.5), {"ce", "teacher_kl"}),
        (
            DYVM,
            TeacherArgs(kl_weight=0.5, token_weight=0.5),
            {"ce", "token_ratio", "block_ratio", "teacher_kl", "token_kl"},
        ),
    ],
    ids=["hidden_align", "r_meeto", "dyvm"],
)
def test_methods_train_with_their_terms(reduction, teacher, terms, vim, tmp_path):
    net, spy = module(reduction, vim, teacher), Logged()
    before = copy.deepcopy(net.model.state_dict())
    fit = trainer(tmp_path, spy, EmaWeights(0.9), max_epochs=1, log_every_n_steps=1)
    fit.fit(net, data())
    assert {name.removeprefix("train/") for name in spy.names if name.startswith("train/")} == terms | {"loss", "lr"}
    after = net.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = mambascope.load(tmp_path / "a.ckpt")
    assert loaded.config.reduction.name == reduction["name"]
    held = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in held} == {"model"}  # no teacher


def test_validation_reports_what_ran(vim, tmp_path):
    net, images = module({"name": "dyvm", "keep": 0.7, "block_ratio": 0.5}, vim), data()
    with torch.no_grad():
        for switch in net.model.reduction.switches:
            switch.weight.normal_(std=20.0)
            switch.bias.zero_()
    fit = trainer(tmp_path)
    fit.validate(net, images, verbose=False)
    metrics = fit.callback_metrics
    share = scan_share(net.model, images.val_dataloader())
    assert any(0 < block < 1 for block in share)
    for block, ran in enumerate(share):
        assert metrics[f"val/scan_share_{block}"].item() == pytest.approx(ran)
    for convention, suffix in (("one_direction", ""), ("both_directions", "_both_directions")):
        cost = stage_macs(net.model.config, convention=convention, scan_share=share)
        assert metrics[f"val/gflops{suffix}"].item() == pytest.approx(cost.gflops(), rel=1e-6)


def test_the_teacher_is_the_unreduced_vim(vim):
    net = module(DYVM, vim, TeacherArgs(kl_weight=0.5))
    plain, x = mambascope.load(vim), torch.randn(2, 3, 32, 32)
    logits, patches = net.teacher(x)
    with torch.no_grad():
        assert torch.equal(logits, plain(x))
        features = plain.forward_features(x)
    assert torch.equal(patches, torch.cat([features[:, :32], features[:, 33:]], 1))
    assert not logits.requires_grad
    net.train()
    assert not net.teacher.model.training
    assert isinstance(copy.deepcopy(net.teacher), Teacher)
    assert copy.deepcopy(net.teacher) is net.teacher
    assert not [name for name in net.state_dict() if "teacher" in name]


def test_loss_adds_up(vim):
    net = module(DYVM, vim, TeacherArgs(kl_weight=0.5, token_weight=0.25)).train()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    output = net.model.forward_reduced(x)
    logits, patches = net.teacher(x)
    parts = net.criterion(output, y, net.model.reduction.penalties(output), (logits, patches))
    with torch.no_grad():
        kl = (logits.softmax(1) * (logits.log_softmax(1) - output.logits.log_softmax(1))).sum(1).mean()
        each = []
        for b in range(4):
            for m in range(64):
                if output.kept[b, m] > 0.5:
                    target = patches[b, output.places[b, m]].log_softmax(0)
                    each.append((target.exp() * (target - output.patches[b, m].log_softmax(0))).sum())
        token = torch.stack(each).mean()
        total = cross_entropy(output.logits, y) + 0.5 * kl + 0.25 * token
        total += sum(10 * value for _, value in net.model.reduction.penalties(output).values())
    assert parts["teacher_kl"].item() == pytest.approx(kl.item(), rel=1e-4)
    assert parts["token_kl"].item() == pytest.approx(token.item(), rel=1e-4)
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-4)
    assert [name for name, value in parts.items() if value.requires_grad] == ["loss"]


def test_a_model_equal_to_its_teacher_has_nothing_to_learn_from_it(vim):
    net = module({"name": "hidden_align", "keep": 1}, vim, TeacherArgs(kl_weight=1.0))
    x = torch.randn(2, 3, 32, 32)
    parts = net.criterion(net.model.forward_reduced(x), torch.tensor([1, 2]), {}, net.teacher(x))
    assert parts["teacher_kl"].item() == pytest.approx(0, abs=1e-6)
    assert parts["loss"].item() == pytest.approx(parts["ce"].item(), abs=1e-6)


def test_mistakes(vim, tmp_path):
    with pytest.raises(ValueError, match=r"teacher needs a model with reduction \(net.args.reduction\)"):
        module(None, vim, TeacherArgs(kl_weight=0.5))
    with pytest.raises(ValueError, match=r"teacher.checkpoint must be given"):
        module(MEETO, None, TeacherArgs(kl_weight=0.5))
    with pytest.raises(ValueError, match="kl_weight must be a number >= 0"):
        module(MEETO, vim, TeacherArgs(kl_weight=-1))
    with pytest.raises(ValueError, match="does not exist"):
        module(MEETO, vim, TeacherArgs(str(tmp_path / "none.safetensors"), kl_weight=1.0))
    with pytest.raises(ValueError, match="compile is not available with reduction"):
        ReducedModule(ModelArgs("vim_nano_patch8_64", {**SMALL, "reduction": MEETO}), compile=True)
    net = module(MEETO, vim, TeacherArgs(token_weight=0.5))
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="token_weight must be 0 where tokens are merged"):
        net.criterion(net.model.forward_reduced(x), torch.tensor([1, 2]), {}, net.teacher(x))
    with pytest.raises(ValueError, match="the teacher's outputs must be given"):
        ReductionLoss(kl_weight=1.0)(net.model.forward_reduced(x), torch.tensor([1, 2]), {})


def test_the_command_trains_resumes_and_keeps_its_teacher(vim, tmp_path):
    options = tiny(
        model__net__name="vim_nano_patch8_64",
        model__net__args__depth=4,
        model__net__args__patch_size=4,
        model__net__args__reduction='{"name": "dyvm", "keep": 0.8}',
        model__net__checkpoint=vim,
        model__teacher__kl_weight=0.5,
        model__teacher__token_weight=0.5,
        trainer__max_epochs=1,
        run__report="true",
        run__name="dyvm",
    )
    # the data's own config has MambaScope's options
    (tmp_path / "plain.yaml").write_text(
        yaml.safe_dump({"data": {"class_path": "mambascope.data.ScopeDigitsDataModule", "init_args": {}}})
    )
    options = [o for o in options if "full_refine" not in o]
    done = train("--config", tmp_path / "plain.yaml", "--trainer.accelerator=cpu", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "dyvm"
    loaded = mambascope.load(run)
    assert loaded.config.reduction.keep == 0.8
    assert "GFLOPs" in (run / "report" / "report.txt").read_text()
    assert "train/token_kl" in next(run.rglob("*.csv")).read_text()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["teacher"]["checkpoint"] == vim
    again = train(
        "--ckpt_path", "last", "--run.name", "dyvm", "--trainer.max_epochs=2", "--run.report=false", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 24
