"""Closed-form cost against the published tables and parameter counts."""

import json
import subprocess
import sys

import pytest

from mambascope.commands import cost as command
from mambascope.commands.cost import model_config
from mambascope.models import cost
from mambascope.models.cost import stage_macs

SIZES = ("tiny", "small", "base")
# GFLOPs rounded as they are printed in the tables of Vim (arXiv 2401.09417) and MambaScope (arXiv 2512.00647)
VIM_FULL = {"one_direction": ("1.45", "5.08", "18.87"), "both_directions": ("1.82", "5.91", "20.9")}
COARSE = {"one_direction": ("0.37", "1.29", "4.79"), "both_directions": ("0.46", "1.50", "5.30")}
FINE = {
    "tiny": {0.5: "0.93", 0.6: "1.04", 0.7: "1.15", 0.8: "1.25", 0.9: "1.36"},
    "small": {0.5: "3.24", 0.6: "3.62", 0.7: "4.01", 0.8: "4.39", 0.9: "4.77"},
    "base": {0.5: "12.0", 0.6: "13.4", 0.7: "14.9", 0.8: "16.3", 0.9: "17.7"},
}


def printed(macs: float, like: str) -> str:
    """Rounds to as many decimals as the table's entry has."""
    return f"{macs / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("convention", cost.CONVENTIONS)
def test_vim_and_coarse_rows_of_the_published_table(convention):
    for size, full, coarse in zip(SIZES, VIM_FULL[convention], COARSE[convention], strict=True):
        vim = stage_macs(model_config(f"vim_{size}_patch16_224"), convention=convention)
        scope = stage_macs(model_config(f"mambascope_{size}_patch16_224"), convention=convention)
        assert vim.tokens_fine == 197
        assert printed(vim.refined, full) == full
        assert scope.tokens_coarse == 50
        assert printed(scope.coarse, coarse) == coarse


@pytest.mark.parametrize("size", SIZES)
def test_fine_stage_rows_of_the_published_table(size):
    config = model_config(f"mambascope_{size}_patch16_224")
    for alpha, expected in FINE[size].items():
        assert printed(stage_macs(config, alpha=alpha).fine, expected) == expected


def test_parameter_counts():
    counts = [cost.count_parameters(model_config(f"vim_{s}_patch16_224")) for s in SIZES]
    assert counts == [7_148_008, 25_796_584, 97_598_440]
    counts = [cost.count_parameters(model_config(f"mambascope_{s}_patch16_224")) for s in SIZES]
    assert counts == [7_453_864, 26_998_120, 102_360_808]


def test_expected_cost_and_savings_are_linear_in_the_refined_share():
    c = stage_macs(model_config("mambascope_small_patch16_224"))
    assert c.expected(0) == c.coarse
    assert c.expected(1) == c.refined == c.coarse + c.reuse + c.fine
    assert c.gflops(0.5) == pytest.approx((c.coarse + c.refined) / 2e9)
    with pytest.raises(ValueError, match="share"):
        c.expected(1.2)


def test_sizes_that_do_not_fit_are_padded():
    config = model_config("mambascope_tiny_patch16_224")
    assert cost.scope_grid(config, (225, 300)) == (8, 10)
    assert stage_macs(config, (225, 300)) == stage_macs(config, (256, 320))
    assert cost.vim_grid(model_config("vim_tiny_patch16_224"), (225, 300)) == (15, 19)
    assert cost.vim_grid(model_config("vim_tiny_patch16_224", stride=8)) == (27, 27)


def test_options_change_the_cost():
    base = model_config("mambascope_tiny_patch16_224")
    linear, off = (model_config("mambascope_tiny_patch16_224", reuse=r) for r in ("linear", "off"))
    assert stage_macs(off).reuse == 0
    assert 8 * stage_macs(linear).reuse == stage_macs(base).reuse
    assert cost.count_parameters(off) < cost.count_parameters(linear) < cost.count_parameters(base)
    with_cls = model_config("mambascope_tiny_patch16_224", reuse_cls=True)
    assert stage_macs(with_cls).reuse > stage_macs(base).reuse
    assert cost.skipped_macs(base, alpha=1.0) == 0 < cost.skipped_macs(base, alpha=0.5)


def test_plain_vim_is_the_model_that_is_compared_with():
    plain = cost.plain_vim(model_config("mambascope_base_patch16_224", num_classes=10))
    assert plain == model_config("vim_base_patch16_224", num_classes=10)


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"alpha": -0.1}, {"img_size": 0}, {"convention": "three"}])
def test_bad_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        stage_macs(model_config("mambascope_tiny_patch16_224"), **bad)


def test_command_prints_the_table_and_json(capsys):
    assert command.main(["mambascope_small_patch16_224", "--alpha", "0.5", "--share", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "26,998,120 parameters" in out
    assert [line.split()[-2:] for line in out.splitlines() if line.startswith("fine (alpha 0.5)")] == [["3.24", "3.77"]]
    assert "expected, 50% refined" in out
    assert command.main(["vim_tiny_patch16_224", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 7_148_008


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["mambascope_huge"], "unknown model 'mambascope_huge'"),
        (["mambascope_tiny_patch16_224", "--alpha", "2"], "alpha"),
        (["vim_tiny_patch16_224", "--alpha", "0.5"], "plain Vim has one stage"),
        (["vim_tiny_patch16_224", "--img-size", "1", "2", "3"], "img_size"),
        (["mambascope_tiny_patch16_224", "--share", "2"], "share"),
    ],
)
def test_command_errors_are_one_line(argv, word, capsys):
    assert command.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert word in err
    assert err.count("\n") == 1


def test_command_runs_as_a_module_without_warnings():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "mambascope.commands.cost", "vim_tiny_patch16_224"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "7,148,008 parameters" in done.stdout
