"""Lightning runs that stop anywhere and continue see the batches of the uninterrupted run, in its order."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mambascope.data import ImageDataModule, ScopeDigitsDataModule
from mambascope.data.export_scopedigits import export

EPOCHS = 3


class Recorder(LightningModule):
    """Learns a little and writes down what it is shown."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.layer = torch.nn.Linear(3, 10)
        self.seen = []
        self.stop_at = stop_at

    def training_step(self, batch, batch_idx):
        images, labels = batch
        if self.stop_at == (self.current_epoch, batch_idx):
            raise RuntimeError("power cut")  # after the batch was fetched, before it was used
        self.seen.append((self.current_epoch, batch_idx, images.double().sum().item(), labels.tolist()))
        return torch.nn.functional.cross_entropy(self.layer(images.mean((2, 3))), labels)

    def validation_step(self, batch, batch_idx):
        self.log("val_mean", batch[0].mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class SaveOnFailure(Callback):
    def __init__(self, path):
        self.path = path

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def digits(**options):
    return ScopeDigitsDataModule(train_length=40, val_length=10, batch_size=8, seed=3, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export("cls", tmp_path_factory.mktemp("resume") / "set", size=32, train=40, val=10, quiet=True)


def make_data(kind, folder):
    workers = 2 if "workers" in kind else 0
    if kind.startswith("digits"):
        return digits(num_workers=workers)
    return ImageDataModule(str(folder), img_size=32, batch_size=8, num_workers=workers, num_aug_repeats=2, seed=3)


def run(data, directory, module, ckpt_path=None, callbacks=(), epochs=EPOCHS, **options):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        callbacks=list(callbacks),
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable.*")
        warnings.filterwarnings("ignore")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module


def whole_run(kind, folder, tmp_path):
    module = run(make_data(kind, folder), tmp_path, Recorder())
    assert [(epoch, step) for epoch, step, *_ in module.seen] == [(e, s) for e in range(EPOCHS) for s in range(5)]
    assert len({total for *_, total, _ in module.seen}) == 15, "every batch is different, also between epochs"
    return module


@pytest.mark.parametrize("kind", ["digits", "digits, workers", "folder", "folder, workers"])
def test_resume_from_the_middle_of_an_epoch(kind, folder, tmp_path):
    whole = whole_run(kind, folder, tmp_path)
    torch.manual_seed(0)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run(make_data(kind, folder), tmp_path, Recorder(), callbacks=[keep], epochs=2)
    for step in (1, 4, 5, 7, 10):  # within and at the end of the epochs of 5 steps
        torch.manual_seed(step)  # neither generators nor the number of workers may matter
        data = make_data(kind.split(",")[0] if step == 7 else kind, folder)
        resumed = run(data, tmp_path, Recorder(), tmp_path / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}])
def test_resume_after_an_exception_repeats_the_unused_batch(folder, tmp_path, options):
    whole = run(digits(), tmp_path, Recorder(), **options)
    path = tmp_path / "failed.ckpt"
    torch.manual_seed(0)
    first = Recorder(stop_at=(1, 1))
    with pytest.raises(RuntimeError, match="power cut"):
        run(digits(num_workers=1), tmp_path, first, callbacks=[SaveOnFailure(path)], **options)
    resumed = run(digits(), tmp_path, Recorder(), path, **options)
    assert first.seen + resumed.seen == whole.seen


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_resume_from_the_end_of_an_epoch(folder, tmp_path, on_train_epoch_end):
    whole = whole_run("digits", folder, tmp_path)
    keep = ModelCheckpoint(
        tmp_path, filename="{epoch}", monitor=None, save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end
    )
    torch.manual_seed(0)
    run(digits(), tmp_path, Recorder(), callbacks=[keep], epochs=2)
    for epoch in (0, 1):
        resumed = run(digits(), tmp_path, Recorder(), tmp_path / f"epoch={epoch}.ckpt")
        assert resumed.seen == whole.seen[5 * (epoch + 1) :]


def test_set_position_without_lightning():
    data = digits()
    loader = data.train_dataloader()
    loader.set_epoch(1)
    expected = [x.double().sum().item() for x, _ in loader]
    other = digits()
    other.set_position(1, 2)
    loader = other.train_dataloader()
    assert len(loader) == 5
    assert [x.double().sum().item() for x, _ in loader] == expected[2:]
    assert [x.double().sum().item() for x, _ in loader] == expected, "only the first pass is shortened"
    other.set_position(0, 5)
    assert list(loader) == []
    with pytest.raises(ValueError, match="batches_done must be in"):
        other.set_position(0, 6)


def test_fast_forward_reads_no_image(folder, monkeypatch):
    import mambascope.data.sources as sources

    data = ImageDataModule(str(folder), img_size=32, batch_size=8, num_workers=0)
    data.setup()
    opened = []
    real = sources.open_image
    monkeypatch.setattr(sources, "open_image", lambda file, name, *how: opened.append(name) or real(file, name, *how))
    data.set_position(0, 4)
    assert len(list(data.train_dataloader())) == 1
    assert len(opened) == 8


def test_state_of_other_data_is_reported(caplog):
    state = digits().train_dataloader().state_dict()
    assert state == {
        "epoch": 0,
        "batches_done": 0,
        "seed": 3,
        "length": 40,
        "batch_size": 8,
        "world_size": 1,
        "repeats": 1,
    }
    other = ScopeDigitsDataModule(train_length=40, batch_size=4, seed=3).train_dataloader()
    other.load_state_dict(state)
    assert "batch_size 8 -> 4" in caplog.text


@pytest.mark.parametrize("kind", ["digits", "folder", "folder, workers"])
def test_overfitting_sees_the_same_batches_in_every_epoch(kind, folder, tmp_path):
    seen = run(make_data(kind, folder), tmp_path, Recorder(), overfit_batches=2).seen
    assert [(epoch, step) for epoch, step, *_ in seen] == [(e, s) for e in range(EPOCHS) for s in range(2)]
    assert len({total for *_, total, _ in seen}) == 2
    assert seen[0][2:] != seen[1][2:]
    assert [batch[2:] for batch in seen[2:4]] == [batch[2:] for batch in seen[:2]]
    assert len({label for *_, labels in seen for label in labels}) > 2, "drawn from all classes, not the first images"
