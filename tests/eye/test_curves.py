"""Accuracy of a MambaEye against glimpses, early stopping, and what a glimpse costs."""

import numpy as np
import pytest
import torch

from mambascope.eye import MAMBAEYE_CONFIGS
from mambascope.eye.curves import StopOptions, evaluate_glimpses, evaluate_stopping, glimpse_macs
from mambascope.eye.stopping import corrected_confidence
from tests.eye.common import OPTIONS, Pictures


def by_hand(model, seed=0):
    """Logits, coverage and labels of all pictures, each as one whole sequence."""
    rows = []
    for i in range(7):
        picture, label = Pictures()(i)
        sequence = OPTIONS.sequence(picture, (seed, i))
        with torch.no_grad():
            logits = model(sequence.patches[None], sequence.moves[None])[0]
        rows.append((logits, sequence.information_ratio, label))
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), torch.tensor([r[2] for r in rows])


@pytest.mark.parametrize(("batch_size", "chunk"), [(64, 128), (3, 7), (1, 1)])
def test_curves_equal_whole_sequences(model, batch_size, chunk):
    logits, coverage, labels = by_hand(model)
    stop = StopOptions(("confidence", "raw"), every=3, min_coverage=0.1, thresholds=(0.0, 0.3, 0.6, 0.9, 1.1))
    curve = evaluate_glimpses(model, Pictures(), OPTIONS, stop=stop, batch_size=batch_size, chunk=chunk)
    assert curve.images == 7
    correct = logits.argmax(-1) == labels[:, None]
    assert curve.hits.tolist() == correct.sum(0).tolist()
    assert curve.mean_coverage == pytest.approx(coverage.mean(0).numpy(), abs=1e-6)
    for part in curve.stops:
        sure = corrected_confidence(logits, coverage, part.criterion)
        for k, threshold in enumerate(stop.thresholds):
            checks = [*range(2, 19, 3), 19]
            ends = [
                next((t for t in checks if sure[i, t] >= threshold and coverage[i, t] >= 0.1), 19) for i in range(7)
            ]
            assert part.used[k] == sum(e + 1 for e in ends)
            assert part.hits[k] == sum(int(correct[i, e]) for i, e in enumerate(ends))
    # really stopping gives what the sweep promised
    middle = curve.stops[0]
    top1, used, count = evaluate_stopping(model, Pictures(), OPTIONS, threshold=0.6, stop=stop, batch_size=batch_size)
    assert (top1, used, count) == (middle.top1[2], pytest.approx(middle.mean_glimpses[2]), 7)
    assert curve.needed(-1.0) == 1
    assert curve.needed(1.1) is None
    assert middle.choose(0.0) == int(np.flatnonzero(middle.used == middle.used.min())[0])
    assert middle.choose(2.0) == int(middle.top1.argmax())


def test_never_more_logits_than_a_chunk(model):
    sizes = []
    handle = model.classification_head.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[:2].numel()))
    evaluate_glimpses(model, Pictures(), OPTIONS, batch_size=4, chunk=6)
    handle.remove()
    assert max(sizes) == 4 * 6
    assert sum(sizes) == 7 * 20


def test_cost_of_a_glimpse_is_the_published_one():
    for size, macs in (("tiny", 6.93), ("small", 13.28), ("base", 25.97)):
        assert glimpse_macs(MAMBAEYE_CONFIGS[f"mambaeye_{size}"]) / 1e6 == pytest.approx(macs, abs=0.006)
