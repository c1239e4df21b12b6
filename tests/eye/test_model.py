"""MambaEye: the official numbers, and reading an image piece by piece."""

import itertools
import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from mambascope.eye import MambaEye, MambaEyeConfig
from mambascope.eye.glimpses import extract_patches, moves_from_positions
from mambascope.eye.loss import GlimpseLoss
from mambascope.eye.model import move_embedding
from tests.conftest import GOLDEN, relative_error

SMALL = {"embed_dim": 32, "depth": 3, "d_state": 8, "head_dim": 16, "move_dim": 8, "patch_size": 4, "num_classes": 5}
SIZES = {"mambaeye_tiny": 5_769_480, "mambaeye_small": 10_953_768, "mambaeye_base": 21_322_344}
LENGTH = 37


@pytest.fixture
def model():
    return MambaEye(**SMALL, chunk_size=8).double().eval()


@pytest.fixture
def sequence():
    positions = torch.randint(0, 60, (3, LENGTH, 2))
    return torch.rand(3, LENGTH, 48, dtype=torch.float64), moves_from_positions(positions)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "mambaeye_official_a.safetensors", framework="pt") as f:
        return json.loads(f.metadata()["config"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


# ---- the official code -----------------------------------------------------------------------------------------------


def official(golden, **options):
    config, tensors = golden
    assert (config["input_dim"], config["d_conv"], config["expand"]) == (1280, 4, 2)
    model = MambaEye(
        num_classes=config["num_classes"],
        embed_dim=config["dim"],
        depth=config["depth"],
        d_state=config["d_state"],
        **options,
    )
    model.load_state_dict({k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")})
    assert model.config.input_dim == config["input_dim"]
    return model.eval()


def glimpses(golden):
    """Patches cut by plain slicing, and moves."""
    tensors = golden[1]
    positions = torch.stack([tensors["rows"], tensors["cols"]], -1)
    patches = [
        torch.stack([image[:, r : r + 16, c : c + 16].flatten() for r, c in places.tolist()])
        for image, places in zip(tensors["image"], positions, strict=True)
    ]
    return torch.stack(patches), moves_from_positions(positions)


def test_golden_move_embedding(golden):
    embedding = move_embedding(glimpses(golden)[1], 256)
    assert (embedding - golden[1]["move_embedding"]).abs().max() < 1e-5
    assert embedding[:, 0, :128].abs().max() == embedding[:, 0, 256:384].abs().max() == 0  # sines of no move
    assert embedding[:, 0, 128:256].min() == embedding[:, 0, 384:].min() == 1  # cosines


@pytest.mark.parametrize("options", [{"scan_backend": "reference"}, {"chunk_size": 16}, {"chunk_size": 7}, {}])
def test_golden_logits_and_loss(golden, options):
    model, tensors = official(golden, **options), golden[1]
    patches, moves = glimpses(golden)
    with torch.no_grad():
        logits = model(patches, moves)
    assert logits.shape == tensors["logits"].shape == (2, 40, 10)
    per_step = [relative_error(logits[:, t], tensors["logits"][:, t]) for t in range(40)]
    assert max(per_step) < 1e-4
    assert torch.allclose(model(patches, tensors["move_embedding"]), logits, atol=1e-5)  # moves given as embeddings
    loss = GlimpseLoss()(logits, tensors["label"], tensors["information_ratio"])["loss"]
    assert relative_error(loss, tensors["loss"][0]) < 1e-5


def test_golden_logits_step_by_step(golden):
    model, (patches, moves) = official(golden), glimpses(golden)
    state = model.start(2)
    with torch.no_grad():
        for t in range(40):
            state = model.step(state, patches[:, t], moves[:, t])
            assert relative_error(state.logits, golden[1]["logits"][:, t]) < 1e-4


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_frozen_names(name):
    """The published counts, and the official checkpoint's names and shapes."""
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    shapes = {
        "init_fc.0.weight": (256, 1280),
        "init_fc.0.bias": (256,),
        "mamba2_net.norm_f.weight": (256,),
        "classification_head.0.weight": (1000, 256),
        "classification_head.0.bias": (1000,),
    }
    for i in range({"tiny": 12, "small": 24, "base": 48}[name.removeprefix("mambaeye_")]):
        layer = {
            "norm.weight": (256,),
            "mixer.dt_bias": (8,),
            "mixer.A_log": (8,),
            "mixer.D": (8,),
            "mixer.in_proj.weight": (1160, 256),
            "mixer.conv1d.weight": (640, 1, 4),
            "mixer.conv1d.bias": (640,),
            "mixer.norm.weight": (512,),
            "mixer.out_proj.weight": (256, 512),
        }
        shapes |= {f"mamba2_net.layers.{i}.{k}": v for k, v in layer.items()}
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes


def test_initialisation():
    model = timm.create_model("mambaeye_tiny")
    mixer = model.mamba2_net.layers[3].mixer
    for weight, bound in (
        (mixer.in_proj.weight, 1 / 16),
        (mixer.conv1d.weight, 0.5),
        (mixer.conv1d.bias, 0.5),
        (mixer.out_proj.weight, 0.01276),
        (model.init_fc[0].weight, 0.02795),
        (model.get_classifier().bias, 0.0625),
    ):
        assert 0.98 * bound < weight.abs().max() <= 1.001 * bound
    rates = torch.cat([layer.mixer.A_log for layer in model.mamba2_net.layers]).exp()
    steps = torch.nn.functional.softplus(torch.cat([layer.mixer.dt_bias for layer in model.mamba2_net.layers]))
    assert 1 <= rates.min() < 2.5
    assert 14 < rates.max() <= 16
    assert 1e-3 <= steps.min() < 3e-3
    assert 0.05 < steps.max() <= 0.1
    assert all((layer.mixer.D == 1).all() and (layer.norm.weight == 1).all() for layer in model.mamba2_net.layers)


# ---- whole, stepwise, chunked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [range(1, LENGTH), (1, 2, 3, 20), (17,), (8, 16, 24, 32), (36,)])
def test_pieces_give_the_logits_of_the_whole(model, sequence, cuts):
    patches, moves = sequence
    whole = model(patches, moves)
    bounds = [0, *cuts, LENGTH]
    state, parts = model.start(3), []
    for start, stop in itertools.pairwise(bounds):
        features, chunked = model.forward_chunk(state, patches[:, start:stop], moves[:, start:stop])
        parts.append(model.forward_head(features))
        state = model.step(state, patches[:, start:stop], moves[:, start:stop])
        assert (state.logits - whole[:, stop - 1]).abs().max() < 1e-8
        assert torch.equal(state.steps, torch.full((3,), stop))
        assert torch.equal(chunked.layers[1].ssm, state.layers[1].ssm)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-8


def test_single_glimpses_of_every_shape(model, sequence):
    patches, moves = sequence
    start = model.start(3)
    flat = model.step(start, patches[:, 0], moves[:, 0]).logits
    square = model.step(start, patches[:, 0].unflatten(-1, (3, 4, 4)), moves[:, 0]).logits
    embedded = model.step(start, patches[:, :1], move_embedding(moves[:, :1].double(), 8)).logits
    assert torch.equal(flat, square)
    assert (flat - embedded).abs().max() < 1e-12


def test_causality(model, sequence):
    patches, moves = sequence
    before = model(patches, moves)
    patches, moves = patches.clone(), moves.clone()
    patches[:, 20:] = torch.rand_like(patches[:, 20:])
    moves[:, 20:] += 5
    after = model(patches, moves)
    assert (after - before)[:, :20].abs().max() < 1e-12
    assert (after - before)[:, 20:].abs().amax((0, 2)).min() > 1e-6


def test_only_displacements_matter(model):
    """Moving all pixels and all positions together changes nothing."""
    positions = np.random.default_rng(0).integers(0, 20, (30, 2))
    pixels = torch.rand(3, 32, 32, dtype=torch.float64)

    def logits(shift):
        canvas = torch.zeros(3, 64, 64, dtype=torch.float64)
        canvas[:, shift : shift + 32, shift : shift + 32] = pixels
        moved = positions + shift
        return model(extract_patches(canvas, moved, 4)[None], moves_from_positions(moved)[None])

    assert torch.equal(logits(0), logits(31))


def test_state_rows(model, sequence):
    """Clone, reorder, drop, repeat and reset rows of the batch; steps leave old states valid."""
    patches, moves = sequence
    half = model.step(model.start(3), patches[:, :20], moves[:, :20])
    rest = (patches[:, 20:], moves[:, 20:])
    expected = model.step(half, *rest).logits
    assert torch.equal(model.step(half, *rest).logits, expected)  # half was not written to

    order = [2, 0, 2]
    picked = half.index_select(order)
    assert torch.equal(picked.logits, half.logits[order])
    assert (model.step(picked, *(t[order] for t in rest)).logits - expected[order]).abs().max() < 1e-12
    dropped = half.drop([1])
    assert len(dropped) == 2
    assert (model.step(dropped, *(t[[0, 2]] for t in rest)).logits - expected[[0, 2]]).abs().max() < 1e-12
    masked = half.index_select(torch.tensor([False, True, False]))
    assert (model.step(masked, *(t[1:2] for t in rest)).logits - expected[1:2]).abs().max() < 1e-12

    copy = half.clone()
    for layer in half.layers:
        layer.ssm.zero_()
    assert (model.step(copy, *rest).logits - expected).abs().max() < 1e-12
    fresh = copy.reset([0])
    assert fresh.steps.tolist() == [0, 20, 20]
    after = model.step(fresh, *rest).logits
    assert (after[1:] - expected[1:]).abs().max() < 1e-12
    assert (after[0] - model(*(t[:1] for t in rest))[0, -1]).abs().max() < 1e-8
    with pytest.raises(ValueError, match=r"rows must lie in 0\.\.2"):
        half.index_select([3])
    with pytest.raises(ValueError, match="mask of 3 images"):
        half.index_select(torch.tensor([True]))


def test_state_size_is_constant(sequence):
    model = MambaEye(**SMALL).eval()
    start = model.start(2)
    sizes = {start.nbytes + 2 * 4 * (32 + 5)}  # before the first glimpse there is no feature and no answer yet
    for length in (1, 5, 100):
        state = model.step(start, torch.rand(2, length, 48), torch.zeros(2, length, 2))
        sizes.add(state.nbytes)
        tensors = [t for layer in state.layers for t in layer] + [state.feature]
        assert all(t.untyped_storage().nbytes() == t.numel() * 4 for t in tensors)  # no view of the whole sequence
    assert len(sizes) == 1


def test_tiny_state_is_as_small_as_published():
    with torch.device("meta"):
        state = timm.create_model("mambaeye_tiny").start(1)
    # conv history 3 x 640 and scan state 8 x 64 x 64 per layer
    assert state.nbytes == 4 * 12 * (3 * 640 + 8 * 64 * 64) + 8


def test_gradients_flow_through_carried_states(sequence):
    model = MambaEye(**SMALL, chunk_size=8).double()
    patches, moves = sequence
    loss = model(patches, moves)[:, -1].square().sum()
    whole = torch.autograd.grad(loss, list(model.parameters()))
    state = model.step(model.start(3), patches[:, :15], moves[:, :15])
    state = model.step(state, patches[:, 15:], moves[:, 15:])
    pieces = torch.autograd.grad(state.logits.square().sum(), list(model.parameters()))
    assert max(relative_error(a, b) for a, b in zip(pieces, whole, strict=True)) < 1e-9


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_gradients_match_the_recurrence(sequence, checkpointing):
    """Every parameter's gradient in fp32 against the plain recurrence in fp64."""
    results = []
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32)):
        torch.manual_seed(1)
        model = MambaEye(**SMALL, scan_backend=backend, chunk_size=8).to(dtype).train()
        model.set_grad_checkpointing(checkpointing)
        logits = model(*sequence)
        loss = GlimpseLoss()(logits, torch.tensor([0, 1, 4]), torch.linspace(0.1, 1, LENGTH).expand(3, -1))["loss"]
        loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    errors = {n: relative_error(results[1][n], g) for n, g in results[0].items()}
    assert max(errors.values()) < 1e-3, errors


def test_autocast_keeps_an_fp32_state(sequence):
    model = MambaEye(**SMALL).eval()
    patches, moves = sequence
    with torch.no_grad():
        exact = model(patches, moves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(patches, moves)
            state = model.step(model.step(model.start(3), patches[:, :9], moves[:, :9]), patches[:, 9:], moves[:, 9:])
    assert {layer.ssm.dtype for layer in state.layers} == {torch.float32}
    assert relative_error(low, exact) < 0.05
    assert relative_error(state.logits, low[:, -1]) < 0.05


def test_dropout_and_drop_path_act_in_training_only(sequence):
    model = MambaEye(**SMALL, drop_rate=0.2, drop_path_rate=0.5)
    model.train()
    assert not torch.equal(model(*sequence), model(*sequence))
    model.eval()
    assert torch.equal(model(*sequence), model(*sequence))


# ---- loss and errors -------------------------------------------------------------------------------------------------


def test_loss_is_soft_cross_entropy():
    logits = torch.randn(3, 6, 4, dtype=torch.float64)
    target, ratio = torch.tensor([2, 0, 3]), torch.rand(3, 6, dtype=torch.float64)
    q = (1 - ratio)[..., None] / 4 + ratio[..., None] * torch.nn.functional.one_hot(target, 4)[:, None]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), q.flatten(0, 1))
    parts = GlimpseLoss()(logits, target, ratio)
    assert parts["loss"].item() == pytest.approx(expected.item())
    # the floor is what the target itself would cost
    assert parts["floor"].item() == pytest.approx(GlimpseLoss()(q.log(), target, ratio)["loss"].item())
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(6))
    assert GlimpseLoss(plain_ce=True)(logits, target)["loss"].item() == pytest.approx(plain.item())
    with pytest.raises(ValueError, match="information_ratio must be given"):
        GlimpseLoss()(logits, target)
    with pytest.raises(ValueError, match=r"information_ratio must be \[3, 6\]"):
        GlimpseLoss()(logits, target, ratio[:, :5])


@pytest.mark.parametrize(
    ("patches", "moves", "message"),
    [
        ((2, 5, 47), (2, 5, 2), r"patches must be \[B, L, 48\].*or \[B, L, 3, 4, 4\], got \[2, 5, 47\]"),
        ((2, 5, 3, 8, 8), (2, 5, 2), r"patches must be \[B, L, 3, 4, 4\]"),
        ((2, 3, 64, 64), (2, 5, 2), r"patches must be \[B, L, 48\]"),
        ((2, 0, 48), (2, 0, 2), "at least one glimpse"),
        ((2, 5, 48), (2, 4, 2), r"moves must be \[2, 5, 2\] in pixels"),
        ((2, 5, 48), (2, 5, 3), r"or their embedding \[2, 5, 16\]"),
    ],
)
def test_bad_shapes_name_themselves(patches, moves, message):
    with pytest.raises(ValueError, match=message):
        MambaEye(**SMALL)(torch.zeros(patches), torch.zeros(moves))


def test_bad_states_and_options_name_themselves():
    model = MambaEye(**SMALL)
    with pytest.raises(ValueError, match="of the 3 images of the state, got 2"):
        model.step(model.start(3), torch.zeros(2, 48), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="state must have 3 layers"):
        model.step(MambaEye(**{**SMALL, "depth": 1}).start(2), torch.zeros(2, 48), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.start(0)
    for bad, message in (
        ({"head_dim": 24}, "head_dim must divide the inner width 64"),
        ({"move_dim": 7}, "move_dim must be even"),
        ({"depth": 0}, "depth must be a positive integer"),
        ({"num_classes": -1}, "num_classes must be an integer >= 0"),
        ({"drop_rate": 1.0}, r"drop_rate must lie in \[0, 1\)"),
        ({"norm_eps": 0}, "norm_eps must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            MambaEyeConfig(**{**SMALL, **bad})
