"""The closed form against torch.utils.flop_counter on the running models: equal to the last operation."""

import pytest
import timm
import torch

from mambascope.commands import cost
from mambascope.models.cost import count_parameters
from mambascope.models.flop_count import count_macs, expected_count

CASES = [
    ("vim_nano_patch8_64", {}),
    ("vim_nano_patch8_64", {"stride": 4}),
    ("mambascope_nano_patch8_64", {"alpha": 0.5}),
    ("mambascope_nano_patch8_64", {"alpha": 1.0, "reuse": "linear"}),
    ("mambascope_nano_patch8_64", {"reuse": "off", "img_size": (48, 80)}),
    ("mambascope_nano_patch8_64", {"reuse_cls": True, "fine_cls": "last", "cell_order": "raster"}),
    ("mambascope_nano_patch8_64", {"score_metric": "l2", "d_state": 8, "expand": 1}),
    ("vim_nano_patch8_64", {"global_pool": "lse"}),
    ("mambascope_nano_patch8_64", {"alpha": 0.5, "global_pool": "lse"}),
    ("vim_nano_patch8_64", {"global_pool": ""}),
    ("vim_nano_patch8_64", {"stem_width": 12, "img_size": (48, 80)}),
    ("mambascope_nano_patch8_64", {"stem_width": 12, "alpha": 0.4}),
    ("vim_tiny_patch16_224", {"depth": 3}),
    ("mambascope_tiny_patch16_224", {"depth": 3}),
    ("mambascope_tiny_patch16_224", {"depth": 3, "stem_width": 24}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_counted_equals_the_closed_form(name, options):
    model = timm.create_model(name, **options)
    assert count_macs(model) == expected_count(model)


def test_other_sizes_and_alphas_than_configured():
    model = timm.create_model("mambascope_nano_patch8_64")
    model.alpha = 0.25
    assert count_macs(model, (70, 64)) == expected_count(model, (70, 64))
    assert count_macs(model, (70, 64)) != expected_count(model)


def test_counted_parameters_equal_the_closed_form():
    for name, options in CASES:
        model = timm.create_model(name, **options)
        assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config), (name, options)


def test_dynamic_inference_costs_what_the_sweep_says(tiny_scope, images, eta):
    """The mean over a mixed batch, counted by running it, equals coarse + share · (reuse + fine)."""
    from mambascope.ops.flops import count_macs as counted

    with torch.inference_mode():
        total = counted(tiny_scope.forward_scope, images, eta)
        share = 1 - tiny_scope.forward_scope(images, eta).exited.double().mean().item()
    once = expected_count(tiny_scope)
    assert total == pytest.approx(len(images) * (once.coarse + share * once.fine))


def test_the_command_counts_too(capsys):
    assert cost.main(["mambascope_nano_patch8_64", "--count", "--alpha", "0.5"]) == 0
    out = capsys.readouterr().out
    assert out.count("equal to the closed form") == 2
    assert cost.main(["vim_nano_patch8_64", "--count"]) == 0
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if "counted" in line)
    assert line[2] == "0.0518"
