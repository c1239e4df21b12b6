"""What users get wrong and what machines do to them, through the real training tool; see also test_cli, test_resume."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

import mambascope
from mambascope.commands.train import main
from mambascope.models.checkpoint import read_state_dict
from tests.hostile import RunsCode, fill, obey_modes, small_disk, small_shared_memory
from tests.training.helpers import tiny, train

NAMES = ("ant", "bee", "cat")


class DiskFull(Callback):
    """From this step on every file is cut off at a few kB, or the file system has no room."""

    def __init__(self, step: int, disk: str | None = None) -> None:
        self.step, self.disk = step, disk

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step and self.disk is None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        elif trainer.global_step == self.step:
            fill(Path(self.disk), leave=8192)


class KillWorker(Callback):
    """Kills a worker process of the training loader, as the system does when memory is short."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)


class Poison(Callback):
    """Spoils the images of one step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step + 1 == 20:
            batch[0].fill_(float("nan"))


@pytest.fixture
def folder(tmp_path):
    """An ImageNet-like folder of three classes."""
    for split in ("train", "val"):
        for name in NAMES:
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 30), (60 * i, 20, 30)).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def on_images(root, **changes):
    """Options of the smallest run on a folder of images."""
    options = [o for o in tiny(**changes) if not o.startswith("--data.")]
    data = ["--data=ImageDataModule", f"--data.root={root}", "--data.img_size=32", "--data.batch_size=2"]
    return ["--config=scopedigits", *data, "--data.num_workers=0", *options]


def last_line(text):
    return text.strip().splitlines()[-1]


def fails(capsys, args, *words):
    """The command ends with one line that holds these words, and no weights were written."""
    try:
        status = main(args)
    except SystemExit as ended:
        status = ended.code
    error = capsys.readouterr().err
    assert status in (1, 2), error
    line = last_line(error)
    assert line.startswith("error: "), error
    for word in words:
        assert word in line, error
    assert not list(Path("runs").rglob("model.safetensors"))


def test_missing_and_empty_folders(here, folder, capsys):
    (here / "empty").mkdir()
    fails(capsys, on_images(here / "nowhere"), "does not exist")
    fails(capsys, on_images(here / "empty"), "it is empty")
    for file in (folder / "train" / "bee").iterdir():
        file.unlink()
    fails(capsys, on_images(folder), "class folders without images", "bee")


def test_classes_and_labels_that_do_not_fit(here, folder, capsys):
    fails(capsys, [*on_images(folder), "--model.net.args.num_classes=2"], "3", "2")
    fails(capsys, [*on_images(folder), "--data.num_classes=2"], "3", "2")


def test_files_that_are_no_images(here, folder, capsys, caplog):
    (folder / "train" / "cat" / "note.png").write_text("not an image")
    fails(capsys, on_images(folder, trainer__max_epochs=1), "cannot read image", "note.png", "skip_bad_files")
    args = [*on_images(folder, trainer__max_epochs=1), "--data.skip_bad_files=true", "--run.name=lenient"]
    assert main(args) == 0
    assert "1 unreadable files skipped" in caplog.text
    assert mambascope.load("runs/lenient/model.safetensors").labels == list(NAMES)


def test_odd_images_train(here, folder):
    top = folder / "train" / "ant"
    Image.new("L", (20, 20), 9).save(top / "grey.png")
    Image.new("CMYK", (20, 20)).save(top / "print.jpg")
    Image.new("I;16", (20, 20), 30000).save(top / "deep.png")
    Image.new("RGBA", (20, 20), (9, 9, 9, 90)).save(top / "alpha.png")
    Image.new("P", (20, 20), 3).save(top / "palette.png")
    Image.new("RGB", (1, 1)).save(top / "dot.png")
    Image.new("1", (12_000, 8_000), 1).save(top / "huge.png")
    Image.new("RGB", (9, 9)).save(top / "film.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), 99)])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (30, 10), 99).save(top / "turned.jpg", exif=turned)
    assert main(on_images(folder, trainer__max_epochs=1)) == 0


def test_wrong_checkpoints(here, capsys):
    trace = here / "code was run"
    torch.save({"model": RunsCode(trace)}, here / "evil.pth")
    torch.save({"conv.weight": torch.zeros(3)}, here / "other.pth")
    (here / "text.safetensors").write_text("hello")
    for name, word in (("evil.pth", "was refused"), ("other.pth", "does not fit"), ("text.safetensors", "cannot be")):
        fails(capsys, tiny(model__net__checkpoint=here / name), name, word)
    torch.save({"state_dict": {}, "loops": {}, "optimizer_states": RunsCode(trace)}, here / "evil.ckpt")
    fails(capsys, [*tiny(), f"--ckpt_path={here / 'evil.ckpt'}"], "evil.ckpt cannot be read")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("alpha=1.5", "alpha must lie in [0, 1]"),
        ("alpha=true", "alpha must lie in [0, 1]"),
        ("threshold=much", "threshold must be a number"),
        ("scan_backend=cuda", "scan_backend must be None or one of reference, torch, cpu, triton, mamba_ssm"),
        ("norm_eps=-1", "norm_eps must be a positive number"),
        ("alhpa=0.5", "unknown model argument alhpa"),
    ],
)
def test_model_options_outside_their_range(option, words, here, capsys):
    fails(capsys, [*tiny(), f"--model.net.args.{option}"], words)


def test_no_permission_to_write(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o555)
    try:
        done = train(*tiny(), cwd=tmp_path, preexec_fn=obey_modes)
        assert done.returncode in (1, 2)
        assert "Permission denied" in last_line(done.stderr)
        assert last_line(done.stderr).startswith("error: ")
        assert not list((tmp_path / "runs").iterdir())
    finally:
        (tmp_path / "runs").chmod(0o755)


def resumes(run: Path, step: int) -> None:
    """The checkpoint of `step` survived, nothing half-written lies beside it, and the run goes on from it."""
    files = {p.name for p in (run / "checkpoints").iterdir()}
    assert files <= {"last.ckpt", "best.ckpt"}
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    state, _ = read_state_dict(run / "checkpoints" / "last.ckpt")
    assert all(value.isfinite().all() for value in state.values())


def test_file_size_limit_keeps_the_previous_checkpoint(tmp_path):
    callback = ["--trainer.callbacks+=tests.training.test_bad_input.DiskFull", "--trainer.callbacks.step=13"]
    done = train(*tiny(run__name="full", run__loggers="[]"), *callback, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "last.ckpt could not be written" in last_line(done.stderr)
    resumes(tmp_path / "runs" / "full", 12)


def test_full_disk_keeps_the_previous_checkpoint_and_the_run_goes_on_later(tmp_path):
    with small_disk(tmp_path / "disk", "4m") as disk:
        callback = ["--trainer.callbacks+=tests.training.test_bad_input.DiskFull", "--trainer.callbacks.step=13"]
        options = [*tiny(run__name="full", run__loggers="[]"), f"--run.root={disk}"]
        done = train(*options, *callback, f"--trainer.callbacks.disk={disk}", cwd=tmp_path)
        assert done.returncode == 1, done.stderr
        assert "could not be written" in last_line(done.stderr)
        resumes(disk / "full", 12)
        (disk / "filler").unlink()
        config = (disk / "full" / "config.yaml").read_text()
        assert "DiskFull" in config
        (disk / "full" / "config.yaml").write_text(config.replace("step: 13", "step: -1"))
        done = train(f"--ckpt_path={disk / 'full' / 'checkpoints' / 'last.ckpt'}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        mambascope.load(disk / "full" / "model.safetensors")


def test_bad_loss_stops_with_the_step_and_keeps_the_last_good_state(here, capsys):
    args = [*tiny(run__name="nan"), "--trainer.callbacks+=tests.training.test_bad_input.Poison"]
    fails(capsys, args, "not finite at step 20", "runs/nan/checkpoints/last.ckpt")
    resumes(Path("runs/nan"), 15)


def test_killed_worker_is_one_line(tmp_path, folder):
    args = [o for o in on_images(folder, run__name="killed") if not o.startswith("--data.num_workers")]
    args += ["--data.num_workers=2", "--trainer.callbacks+=tests.training.test_bad_input.KillWorker"]
    done = train(*args, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "DataLoader worker" in last_line(done.stderr)
    assert "num_workers" in last_line(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_small_shared_memory_is_one_line_and_no_wait(tmp_path, folder, data):
    """The workers of the one collate there, those of the other leave it to the queue between the processes."""
    args = [*on_images(folder), "--data.img_size=96"] if data == "folder" else tiny(data__digits__size=64)
    done = train(*args, "--data.num_workers=1", cwd=tmp_path, before=small_shared_memory("80k"), timeout=100)
    assert done.returncode == 1, done.stderr
    line = last_line(done.stderr)
    assert line.startswith("error: the loader's workers hand images over in shared memory (/dev/shm), which is full")
    for word in ("it has 0.0781 MB", "docker run --shm-size=2g", "num_workers", "batch_size"):
        assert word in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").iterdir())
