"""The figures: files that can be read and show something, and the pure parts against known cases."""

import subprocess
import sys
import zlib

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from mambascope.commands.cost import model_config
from mambascope.evaluation.figures import answers, chosen_point, published_points, timed_point, tradeoff
from mambascope.evaluation.published import rows_for
from mambascope.evaluation.sweep import StageRecord, pick_acc_drop, sweep
from mambascope.evaluation.throughput import Timing
from mambascope.eye.plots import plot_scaling
from mambascope.models.cost import CONVENTIONS, stage_macs
from mambascope.plotting import (
    Example,
    draw_example,
    plot_exits,
    plot_heatmaps,
    plot_tradeoff,
    plot_training_curves,
    style,
)
from mambascope.plotting.curves import read_metrics
from mambascope.plotting.heatmaps import as_seen, outline, selected_mask


@pytest.fixture(scope="module")
def record():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 300)
    onehot = np.eye(6)[labels]
    return StageRecord.from_logits(rng.normal(size=(300, 6)) + onehot, rng.normal(size=(300, 6)) + 4 * onehot, labels)


def example(exited=False, true="3", **changes):
    rng = np.random.default_rng(2)
    values = {
        "image": rng.random((48, 64, 3)),
        "importance": rng.random((3, 4)),
        "selected": np.array([] if exited else [0, 1, 5, 6, 11], dtype=int),
        "exited": exited,
        "predicted": "3",
        "coarse_predicted": "3" if exited else "8",
        "confidence": 0.93 if exited else 0.41,
        "fine_confidence": None if exited else 0.97,
        "true": true,
        "tokens": 13,
        "cell": 16,
    }
    return Example(**{**values, **changes})


def assert_picture(path, min_width=600):
    """Readable, large enough, with a white ground and far more colours than an empty figure."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= min_width
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels[0, 0] == 255).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    assert [p.name for p in path.parent.glob(".*")] == []


def test_outline_follows_the_border_of_the_selected_cells():
    lines = outline(np.array([[True, True], [False, False]]), 16)
    assert len(lines) == 6  # two cells side by side: 2 above, 2 below, 1 at each end
    assert lines.min() == -0.5
    assert lines[..., 0].max() == 31.5
    assert lines[..., 1].max() == 15.5
    assert outline(np.zeros((3, 3), bool), 16).shape == (0, 2, 2)
    # inner borders of a selected block are not drawn: only the 4 + 4 outer sides
    assert len(outline(np.ones((2, 2), bool), 8)) == 8


def test_selected_mask_ignores_the_padding_of_exited_images():
    assert selected_mask(np.array([-1, -1, -1]), (2, 2)).sum() == 0
    assert selected_mask(np.array([0, 3]), (2, 2)).tolist() == [[True, False], [False, True]]


def test_refined_cells_are_shown_sharp_and_the_others_at_half_resolution():
    e = example()
    seen = as_seen(e)
    sharp = selected_mask(e.selected, (3, 4)).repeat(16, 0).repeat(16, 1)
    assert np.array_equal(seen[sharp], e.image[sharp])
    assert np.ptp(seen[16:18, 0:2, 0]) == 0  # an unselected cell: 2 x 2 pixels became one
    out = example(exited=True)
    assert as_seen(out)[4, 4] == pytest.approx(out.image[4:6, 4:6].mean((0, 1)))
    # sides that are odd or no multiple of a cell (the model pads them)
    assert as_seen(example(image=np.random.default_rng(0).random((45, 61, 3)))).shape == (45, 61, 3)


def test_captions_say_stage_answer_and_confidence():
    assert example().caption() == "predicted 3, true 3\ncoarse 8 (0.41) → fine 3 (0.97)"
    assert example(exited=True, true=None).caption() == "predicted 3\nleft after the coarse look (0.93)"
    assert [example(true=t).correct for t in ("3", "4", None)] == [True, False, None]


def test_heat_map_sheets_and_single_pictures(tmp_path):
    sheet = plot_heatmaps([example(), example(exited=True), example(true="5")], tmp_path / "sheet.png", title="Cells")
    assert_picture(sheet)
    assert_picture(draw_example(example(name="cat.jpg"), tmp_path / "one.png"))
    assert_picture(draw_example(example(exited=True, importance=np.ones((3, 4))), tmp_path / "flat.png"))
    with pytest.raises(ValueError, match="examples"):
        plot_heatmaps([], tmp_path / "none.png")


def test_exits(tmp_path, record):
    examples = [example(exited=True), example(), example(true="7")]
    assert_picture(plot_exits(answers(record), examples, 0.5, tmp_path / "exits.png"))
    # nobody exits, and no picture for a stage
    assert_picture(plot_exits(answers(record), [], 1.0, tmp_path / "none.png"))


def test_tradeoff_with_and_without_measured_times_and_published_rows(tmp_path, record):
    config = model_config("mambascope_tiny_patch16_224")
    curve = sweep(record, {c: stage_macs(config, convention=c) for c in CONVENTIONS})
    chosen = pick_acc_drop(curve, 0.01)
    eta = float(curve.threshold[chosen])
    at_eta = sweep(record, {c: stage_macs(config, convention=c) for c in CONVENTIONS}, thresholds=[eta])
    timed = [
        timed_point(Timing(mode, batch, 64, 3, ms, 0.9 * ms, 1.1 * ms, threshold, share), top1)
        for batch in (1, 32)
        for mode, ms, threshold, share, top1 in (
            ("coarse", 1.0, None, 0.0, curve.top1[0]),
            ("refine_all", 4.0, None, 1.0, curve.top1[-1]),
            ("dynamic", 2.5, eta, 0.5, curve.top1[chosen]),
        )
    ]
    both, one = (tradeoff(curve, convention) for convention in ("both_directions", "one_direction"))
    point = chosen_point(at_eta, "both_directions")
    assert (point.threshold, point.top1) == (eta, curve.top1[chosen])
    assert_picture(plot_tradeoff(both, tmp_path / "timed.png", chosen=point, timed=timed, title="T"), min_width=1500)
    plain = plot_tradeoff(one, tmp_path / "plain.png")
    assert_picture(plain)
    published = published_points("mambascope_tiny_patch16_224")
    assert len(published) == 5
    shown = plot_tradeoff(one, tmp_path / "pub.png", published=published)
    assert_picture(shown)
    assert zlib.crc32(shown.read_bytes()) != zlib.crc32(plain.read_bytes())


def test_published_rows_belong_to_the_size_in_the_name():
    assert {row.size for row in rows_for("mambascope_small_patch16_224")} == {"small"}
    assert rows_for("mambascope_nano_patch8_64") == ()


def test_no_axis_is_labelled_in_tex(tmp_path, monkeypatch):
    """Names are drawn as they are, so nothing may rely on TeX."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (saved.append(self), save(self, *args, **options))
    )
    plot_scaling({"a": ([1, 16, 4096], [1.2, 2.5, 40.0], [0, 1, 9])}, tmp_path / "scaling.png")
    texts = [text.get_text() for text in saved[0].findobj(Text)]
    assert {"4096", "10"} <= set(texts)
    assert not [text for text in texts if "$" in text]


def write_log(path):
    lines = [
        "epoch,lr-AdamW,step,train/loss_step,train/loss_epoch,val/coarse_top1,val/fine_top1,val/fine_top5,val/share_refined"
    ]
    for step in range(80):
        lines.append(f"{step // 40},0.001,{step},{2 / (step + 1)},,,,,")
        if step % 40 == 39:
            lines.append(f"{step // 40},,{step},,0.3,0.5,0.6,0.9,0.4")
    lines.append("1,,80,nan,,,,,")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_training_curves_from_lightning_csv(tmp_path):
    log = write_log(tmp_path / "metrics.csv")
    series = read_metrics(log)
    assert len(series["train/loss_step"][0]) == 80  # the NaN is left out, gaps too
    assert series["val/fine_top1"][0].tolist() == [39, 79]
    assert_picture(plot_training_curves(log, tmp_path / "curves.png", title="Training"))
    assert plot_training_curves({"epoch": series["epoch"]}, tmp_path / "nothing.png") is None
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "other.csv")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        read_metrics(tmp_path / "bad.csv")


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = draw_example(example(), tmp_path / "one.png")
    before = path.read_bytes()

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(style.Figure, "savefig", disk_full)
    with pytest.raises(OSError, match="No space left"):
        draw_example(example(exited=True), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["one.png"]


def test_no_window_system_and_no_global_state():
    code = "import sys, mambascope.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
