"""Both stages over a loader: the same answers as the model gives one by one."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mambascope.evaluation.collect import collect
from mambascope.evaluation.sweep import StageRecord, sweep
from mambascope.models import VimConfig, VisionMamba


def test_collect_equals_the_stages_run_by_hand(tiny_scope, images, labels):
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    answers = collect(tiny_scope, loader, progress=False)
    with torch.no_grad():
        both = tiny_scope.forward_both(images)
    expected = StageRecord.from_logits(both.coarse, both.fine, labels)
    assert len(answers.record) == 30
    for name in ("labels", "coarse_pred", "fine_pred", "coarse_top5", "fine_top5"):
        assert np.array_equal(getattr(answers.record, name), getattr(expected, name)), name
    assert answers.record.confidence == pytest.approx(expected.confidence, abs=1e-5)
    assert answers.record.fine_confidence == pytest.approx(expected.fine_confidence, abs=1e-5)


def test_the_sweep_predicts_dynamic_inference(tiny_scope, images, labels, eta):
    record = collect(tiny_scope, [(images, labels)], progress=False).record
    curve = sweep(record, thresholds=[eta])
    with torch.no_grad():
        output = tiny_scope.forward_scope(images, eta)
    assert curve.share_refined[0] == pytest.approx(1 - output.exited.double().mean().item())
    assert curve.top1[0] == pytest.approx((output.logits.argmax(1) == labels).double().mean().item())


def test_sample_is_uniform_reproducible_and_in_order(tiny_scope, images, labels):
    loader = [(images[:20], labels[:20]), (images[20:], labels[20:])]
    first = collect(tiny_scope, loader, keep=5, progress=False)
    assert first.index.tolist() == sorted(set(first.index.tolist()))
    assert torch.equal(first.images, images[first.index])
    assert torch.equal(first.labels, labels[first.index])
    assert torch.equal(first.index, collect(tiny_scope, loader, keep=5, progress=False).index)
    seen = np.concatenate([collect(tiny_scope, loader, keep=5, seed=s, progress=False).index for s in range(12)])
    assert seen.max() >= 20  # late images have a chance
    assert len(collect(tiny_scope, loader, keep=99, progress=False).index) == 30


def test_mode_and_gradients_are_left_as_they_were(tiny_scope, images, labels):
    tiny_scope.train()
    try:
        collect(tiny_scope, [(images[:4], labels[:4])], progress=False)
        assert tiny_scope.training
        assert torch.is_grad_enabled()
    finally:
        tiny_scope.eval()


def test_a_one_stage_model_answers_the_same_twice(images, labels):
    model = VisionMamba(VimConfig(img_size=32, patch_size=8, embed_dim=16, depth=1, num_classes=7))
    record = collect(model, [(images, labels)], progress=False).record
    assert np.array_equal(record.coarse_pred, record.fine_pred)


@pytest.mark.parametrize(
    ("batches", "word"),
    [
        ([], "no images"),
        ([torch.zeros(2, 3, 32, 32)], r"\(images, labels\)"),
        ([(torch.zeros(2, 3, 32, 32), torch.zeros(3, dtype=torch.long))], "labels"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([0, 7]))], "label 7 .* 7 classes"),
        ([(torch.zeros(2, 3, 32, 32), torch.tensor([-1, 0]))], "label -1"),
        ([(torch.full((2, 3, 32, 32), torch.nan), torch.tensor([0, 1]))], "NaN"),
    ],
)
def test_bad_data_is_named(tiny_scope, batches, word):
    with pytest.raises(ValueError, match=word):
        collect(tiny_scope, batches, progress=False)
