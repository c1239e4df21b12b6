"""The fitted temperature is the minimum of the cross entropy, and only it changes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mambascope.evaluation.calibration import BOUNDS, calibrate, fit_temperature
from mambascope.evaluation.sweep import calibration_error
from mambascope.models.gate import confidence


def made_up(scale):
    """Labels drawn from softmax(z), and the logits z times `scale`."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 6, generator=generator) * 2
    labels = torch.multinomial(z.softmax(1), 1, generator=generator).squeeze(1)
    return z * scale, labels


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_it_is_the_minimum_and_undoes_a_scale(scale):
    logits, labels = made_up(scale)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(scale, rel=0.06)
    best = F.cross_entropy(logits.double() / found, labels)
    for other in (0.97, 0.999, 1.001, 1.03):
        assert F.cross_entropy(logits.double() / (found * other), labels) > best
    right = (logits.argmax(1) == labels).numpy()
    after = calibration_error(confidence(logits, temperature=found).numpy(), right)
    assert after < 0.03
    if scale != 1:
        assert after < 0.4 * calibration_error(confidence(logits).numpy(), right)


def test_bounds_where_there_is_no_minimum():
    right = torch.eye(3) * 4
    assert fit_temperature(right, torch.arange(3)) == pytest.approx(BOUNDS[0], rel=1e-6)
    assert fit_temperature(right, (torch.arange(3) + 1) % 3) == pytest.approx(BOUNDS[1], rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "N > 0"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"labels \[N\]"),
        (torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.long), "must be finite"),
    ],
)
def test_bad_input_is_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def test_a_model_is_calibrated(tiny_scope, images):
    model, images = copy.deepcopy(tiny_scope), images.repeat(4, 1, 1, 1)
    with torch.no_grad():
        logits = model.forward_coarse(images).logits
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    found = calibrate(model, [(images[:20], labels[:20]), (images[20:], labels[20:])])
    assert found == pytest.approx(fit_temperature(logits, labels), rel=1e-4)
    assert model.temperature == found
    with pytest.raises(ValueError, match="no images to fit the temperature"):
        calibrate(model, [])
    assert model.temperature == found
