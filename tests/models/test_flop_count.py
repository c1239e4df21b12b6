"""The closed form against torch.utils.flop_counter on the running models: equal to the last operation."""

import random

import pytest
import timm
import torch

from mambascope import MambaScope, ScopeConfig, VimConfig, VisionMamba
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


def random_config(seed):
    """A small Vim or MambaScope in which everything that changes parameters or operations is drawn."""
    rng = random.Random(seed)
    patch = rng.choice([4, 8])
    options = {
        "img_size": (rng.randint(2, 5) * 8, rng.randint(2, 5) * 8 + rng.randint(0, 7)),
        "patch_size": patch,
        "in_chans": rng.choice([1, 3, 4]),
        "num_classes": rng.choice([0, 1, 7]),
        "embed_dim": rng.choice([8, 16, 24]),
        "depth": rng.randint(1, 4),
        "d_state": rng.choice([4, 8]),
        "d_conv": rng.choice([2, 4]),
        "expand": rng.choice([1, 2]),
        "dt_rank": rng.choice([None, 1, 3]),
        "cls_position": rng.choice(["first", "middle", "last"]),
        "global_pool": rng.choice(["token", "avg", "lse", ""]),
        "stem_width": rng.choice([0, 0, 6]) if patch == 8 else 0,
    }
    if seed % 3 == 0:
        overlap = {"stride": rng.choice([None, patch // 2])} if not options["stem_width"] else {}
        return VimConfig(**options, **overlap)
    reuse = rng.choice(["mlp", "linear", "off"])
    return ScopeConfig(
        **options,
        alpha=rng.choice([0.0, 0.3, 0.8, 1.0]),
        reuse=reuse,
        reuse_ratio=rng.choice([0.5, 2.0, 4.3]),
        reuse_cls=reuse != "off" and rng.random() < 0.5,
        coarse_pos=rng.choice(["own", "resampled"]),
        score_metric=rng.choice(["max", "l2", "clip"]),
        fine_cls=rng.choice(["first", "middle", "last"]),
        fine_order=rng.choice(["important_first", "important_last"]),
        cell_order=rng.choice(["cell", "raster"]),
    )


@pytest.mark.parametrize("seed", range(60))
def test_any_model_has_the_parameters_and_operations_that_its_config_says(seed):
    config = random_config(seed)
    model = (MambaScope if isinstance(config, ScopeConfig) else VisionMamba)(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    assert count_macs(model) == expected_count(model)
    size = (50, 41)
    assert count_macs(model, size) == expected_count(model, size)


def test_counting_parameters_draws_no_random_number_and_no_memory():
    before = torch.get_rng_state()
    assert count_parameters(ScopeConfig(embed_dim=8192, depth=48)) > 10**10
    assert torch.equal(before, torch.get_rng_state())
