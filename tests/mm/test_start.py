"""What backbones and classifiers can start from: parts of other models, URLs, files that fit in part."""

import functools
import http.server
import subprocess
import sys
import threading

import pytest
import torch
from mmengine.logging import HistoryBuffer

from mambascope.commands.train import main as train_cls
from mambascope.mm import ScopeBackbone, VimBackbone, loading
from mambascope.mm.weights import local_file
from mambascope.models import load_checkpoint, save_safetensors
from mambascope.models.checkpoint import CheckpointError
from mambascope.models.scope import MambaScope
from mambascope.models.vim import VisionMamba
from tests.hostile import RunsCode
from tests.mm import common

OWN = {**common.TINY, "fine_cls": "middle"}


def scope(checkpoint="", classes=11, **init):
    return ScopeBackbone(
        "mambascope_nano_patch8_64",
        arch_options=OWN,
        gate={"num_classes": classes},
        out_channels=64,
        coarse_resize="learned",
        readout=True,
        img_size=64,
        init_cfg={"type": "Pretrained", "checkpoint": str(checkpoint), **init},
    )


def plain_demo(kind):
    """The demo without what its encoder has beside the published one."""
    arch = {"fine_cls": "middle", "stem_width": 0, "coarse_offsets": False}
    options = {f"model.backbone.arch_options.{name}": value for name, value in arch.items()}
    return common.demo_config(kind, **options, **{"model.backbone.detail": False})


@pytest.fixture
def segmentor(tmp_path):
    """A segmentor's checkpoint as mmengine writes it, with its logged scalars, and the model."""
    torch.manual_seed(0)
    model = loading.build_model(plain_demo("seg"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)  # zero initialisations would be equal without loading
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    path = tmp_path / "iter_2.pth"
    hub = {"log_scalars": {"train/loss": history}, "runtime_info": {}}
    torch.save({"meta": {"iter": 2}, "state_dict": model.state_dict(), "message_hub": hub}, path)
    return path, model


def same(part, other):
    state = part.state_dict()
    return all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("prefix", [None, "backbone.", "backbone"])
def test_a_backbone_starts_from_a_segmentor(prefix, segmentor):
    path, source = segmentor
    model = scope(path, **({} if prefix is None else {"prefix": prefix}))
    model.init_weights()
    for part in ("encoder", "gate", "pyramid", "coarse_up"):
        assert same(getattr(model, part), getattr(source.backbone, part)), part


def test_the_report_names_gate_pyramid_and_tables(segmentor, mm_log):
    path, source = segmentor
    model = scope(path, classes=10, map_location="cpu")
    model.encoder.set_input_size((96, 96))
    before = model.gate.fc.weight.clone()
    model.init_weights()
    assert torch.equal(model.gate.fc.weight, before)
    assert same(model.pyramid, source.backbone.pyramid)
    text = "\n".join(mm_log.messages)
    assert "resampled    2: pos_embed, pos_embed_coarse" in text
    assert "gate: 0 of 2 (gate.fc.weight is [11, 32] in the file and [10, 32] here)" in text
    pyramid = len(model.pyramid.state_dict())
    assert f"pyramid: {pyramid} of {pyramid}" in text
    encoder = len(model.encoder.state_dict())
    assert f"encoder: {encoder} of {encoder}" in text
    assert "new    2: gate.fc.weight, gate.fc.bias" in text


def test_a_detector_starts_from_a_segmentor(segmentor):
    path, source = segmentor
    cfg = plain_demo("det")
    cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": "backbone."}
    model = loading.build_model(cfg)
    model.init_weights()
    assert same(model.backbone.encoder, source.backbone.encoder)
    assert same(model.backbone.pyramid, source.backbone.pyramid)


def test_a_plain_vim_starts_from_a_gated_segmentor_and_the_other_way_round(segmentor, tmp_path):
    path, source = segmentor
    options = {"arch_options": common.TINY, "img_size": 64, "out_channels": 64, "readout": True}
    plain = VimBackbone("vim_nano_patch8_64", init_cfg=[{"type": "Pretrained", "checkpoint": str(path)}], **options)
    plain.init_weights()
    assert torch.equal(plain.encoder.layers[3].mixer.A_log, source.backbone.encoder.layers[3].mixer.A_log)
    torch.save({"state_dict": {f"module.backbone.{k}": v for k, v in plain.state_dict().items()}}, tmp_path / "vim.pth")
    for init in ({}, {"prefix": "backbone"}):
        model = scope(tmp_path / "vim.pth", **init)
        model.init_weights()
        assert same(model.pyramid, plain.pyramid)
        assert torch.equal(model.encoder.pos_embed, plain.encoder.pos_embed)


def test_prefixes_that_no_name_has(segmentor):
    with pytest.raises(
        CheckpointError, match=r"begins with 'bakbone\.'; its names begin with backbone\., decode_head\."
    ):
        scope(segmentor[0], prefix="bakbone.").init_weights()


def test_wrong_init_cfg():
    with pytest.raises(ValueError, match=r"init_cfg must be dict\(type='Pretrained', checkpoint=FILE, prefix=None"):
        scope("x.pth", perfix="backbone.").init_weights()


# ---- what fits in part ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_left_out_without_strict(tmp_path, mm_log):
    torch.manual_seed(0)
    other = MambaScope(img_size=64, patch_size=8, num_classes=10, **{**OWN, "depth": 5, "fine_cls": "first"})
    save_safetensors(other, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"it has depth=5 \(here 4\), fine_cls='first' \(here 'middle'\)"):
        scope(tmp_path / "a.safetensors").init_weights()
    model = scope(tmp_path / "a.safetensors", strict=False)
    model.init_weights()
    assert torch.equal(model.encoder.layers[3].mixer.A_log, other.layers[3].mixer.A_log)
    assert "it has depth=5 (here 4), fine_cls='first' (here 'middle')" in mm_log.text


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_that_fits_advises_nothing(strict, tmp_path):
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3, 3)}}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match="no tensor of the file has a place in the model") as error:
        scope(tmp_path / "resnet.pth", strict=strict).init_weights()
    assert "strict=False" not in str(error.value)


# ---- URLs ----------------------------------------------------------------------------------------------------------


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path / "web"))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_urls_are_loaded(url, tmp_path, segmentor):
    web = tmp_path / "web"
    source = MambaScope(img_size=64, patch_size=8, num_classes=10, **OWN)
    save_safetensors(source, web / "model.safetensors")
    model = scope(f"{url}/model.safetensors")
    model.init_weights()
    assert torch.equal(model.encoder.layers[3].mixer.A_log, source.layers[3].mixer.A_log)
    (web / "other").mkdir()
    save_safetensors(MambaScope(img_size=64, patch_size=8, num_classes=10, **OWN), web / "other" / "model.safetensors")
    assert local_file(f"{url}/other/model.safetensors") != local_file(f"{url}/model.safetensors")
    segmentor[0].rename(web / "iter_2.pth")
    model = scope(f"{url}/iter_2.pth", prefix="backbone.")
    model.init_weights()
    assert same(model.pyramid, segmentor[1].backbone.pyramid)
    cfg = plain_demo("seg")
    assert same(loading.build_model(cfg, f"{url}/iter_2.pth"), segmentor[1])  # what eval_dense and predict_dense do


def test_urls_that_hold_nothing_or_code(url, tmp_path):
    with pytest.raises(CheckpointError, match=rf"checkpoint {url}/none\.pth cannot be downloaded: .*404"):
        scope(f"{url}/none.pth").init_weights()
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "meta": RunsCode(trace)}, tmp_path / "web" / "bad.pth")
    with pytest.raises(CheckpointError, match="refused"):
        scope(f"{url}/bad.pth").init_weights()
    assert not trace.exists()
    with pytest.raises(CheckpointError, match=r"s3://bucket/a\.pth must be a file or an http"):
        scope("s3://bucket/a.pth").init_weights()


# ---- classifiers ---------------------------------------------------------------------------------------------------


def test_a_classifier_starts_from_a_segmentor(segmentor):
    path, source = segmentor
    torch.manual_seed(1)
    model = MambaScope(img_size=96, patch_size=8, num_classes=7, **OWN)
    head = model.head.weight.clone()
    report = load_checkpoint(model, path, verbose=False)
    assert torch.equal(model.layers[3].mixer.A_log, source.backbone.encoder.layers[3].mixer.A_log)
    assert torch.equal(model.head.weight, head)
    assert report.new == ["head.weight", "head.bias"]
    assert report.resampled == ["pos_embed", "pos_embed_coarse"]
    assert report.unused == []
    other = VisionMamba(img_size=64, patch_size=8, num_classes=7, **{**common.TINY, "depth": 3})
    with pytest.raises(CheckpointError, match=r"layers\.3\.\S+ has no place in the model"):
        load_checkpoint(other, path, verbose=False)


def test_train_cls_starts_from_a_detector_without_mmengine(segmentor, tmp_path):
    """mmengine's logs in the file are skipped where mmengine is not imported."""
    path, _ = segmentor
    code = (
        "import sys; from mambascope.models import load_checkpoint; from mambascope.models.scope import MambaScope\n"
        "model = MambaScope(img_size=64, patch_size=8, num_classes=7, depth=4, embed_dim=32, fine_cls='middle')\n"
        f"print(len(load_checkpoint(model, {str(path)!r}, verbose=False).matched), 'mmengine' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 80
    assert done.stdout.split()[1] == "False"


def test_train_cls_command(segmentor, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    small = {"embed_dim": 32, "depth": 4, "fine_cls": "middle"}
    arguments = [
        "--config=scopedigits_published",
        f"--model.net.checkpoint={segmentor[0]}",
        *(f"--model.net.args.{k}={v}" for k, v in small.items()),
        "--data.train_length=8",
        "--data.val_length=4",
        "--data.batch_size=4",
        "--trainer.max_epochs=1",
        "--model.full_refine_epochs=0",
        "--model.schedule.warmup_epochs=0",
        "--run.report=false",
    ]
    assert train_cls(arguments) == 0
    assert "new    2: head.weight, head.bias" in "".join(capfd.readouterr())
