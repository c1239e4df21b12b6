"""Cells ranked by what the gate sees in them: labels, importance, loss, cost, export."""

import pytest
import torch
from torch import nn

from mambascope.mm import DenseGate
from mambascope.mm.cell_labels import cells_from_boxes, cells_from_masks
from mambascope.ops.flops import count_macs
from tests.mm import common
from tests.mm.common import scope

EVIDENCE = {"arch_options": {"score_metric": "evidence"}}


# ---- labels --------------------------------------------------------------------------------------------------------


def test_classes_of_cells_of_masks():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randint(0, 4, (1, *size), generator=generator) for size in ((30, 41), (32, 48))]
    masks[0][:, :16, :16] = 255
    masks[1][:, 20:24, 3:30] = 255
    presence, labelled = cells_from_masks(masks, 5, 16, (2, 3))
    assert presence.shape == (2, 6, 5)
    for image, mask in enumerate(masks):
        for cell in range(6):
            row, col = divmod(cell, 3)
            part = mask[0, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16]
            classes = sorted(set(part.flatten().tolist()) - {255})
            assert presence[image, cell].nonzero().flatten().tolist() == classes
            assert bool(labelled[image, cell]) == bool(classes)
    assert labelled.tolist() == [[False, True, True, True, True, True], [True] * 6]


def test_classes_of_cells_of_boxes():
    boxes = [torch.tensor([[3.0, 2.0, 16.0, 17.0], [31.5, 0.0, 40.0, 1.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2, 0]), torch.zeros(0, dtype=torch.long)]
    crowds = [torch.tensor([[0.0, 20.0, 48.0, 30.0]]), torch.zeros(0, 4)]
    presence, labelled = cells_from_boxes(boxes, labels, crowds, [(32, 40), (16, 30)], 3, 16, (2, 3))
    # the first box ends where the second column begins, and reaches one pixel into the second row
    assert presence[0].nonzero().tolist() == [[0, 2], [1, 0], [2, 0], [3, 2]]
    assert labelled[0].tolist() == [True, True, True, False, False, False]
    assert not bool(presence[1].any())
    assert labelled[1].tolist() == [True, True, False, False, False, False]


def test_objects_of_one_class_count_once():
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(3, 4)
    presence, _ = cells_from_boxes([boxes], [torch.tensor([1, 1, 0])], [torch.zeros(0, 4)], [(16, 16)], 2, 16, (1, 1))
    assert presence.tolist() == [[[1.0, 1.0]]]


# ---- importance ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("score", ["evidence", "evidence_contrast"])
def test_importance_is_how_likely_a_cell_has_any_object(score):
    model = scope(gate={"num_classes": 5, "skip_classes": (0, 3)}, arch_options={"score_metric": score}).eval()
    model.gate.fc.weight.normal_()
    model.gate.fc.bias[0] = 50.0  # a background that is everywhere must not say anything
    x = torch.randn(3, 3, 64, 96)
    coarse = model.encoder.forward_coarse(x)
    absent = 1 - model.gate.fc(coarse.features)[..., [1, 2, 4]].sigmoid()
    expected = 1 - absent[..., 0] * absent[..., 1] * absent[..., 2]
    if score == "evidence_contrast":
        half = model.encoder.half_image(x)
        pixels = half.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
        expected = expected * (pixels.std(-1, correction=0).mean(1).flatten(1) - 1e-3)
    torch.testing.assert_close(model.forward_scope(x).importance, expected)
    model.threshold = 1.0
    best = expected.sort(descending=True, stable=True).indices[:, :17].sort().values
    assert torch.equal(model.forward_scope(x).selected, best)


def test_an_image_has_the_same_evidence_on_any_canvas():
    model = scope(**EVIDENCE).double().eval()
    nn.init.normal_(model.gate.fc.weight)
    canvas = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    sizes = [(64, 64), (40, 33), (16, 64)]
    together = model.forward_scope(canvas, sizes)
    for i, (height, width) in enumerate(sizes):
        alone = model.forward_scope(canvas[i : i + 1, :, :height, :width])
        rows, cols = alone.grid
        importance = together.importance[i].unflatten(0, together.grid)[:rows, :cols].flatten()
        torch.testing.assert_close(importance, alone.importance[0])


def test_the_score_learns_nothing_and_the_loss_teaches_encoder_and_gate():
    model = scope(exit_prob=0.0, **EVIDENCE).train()
    sizes = [(64, 64), (40, 33)]
    features = model.forward_scope(torch.randn(2, 3, 64, 64), sizes)
    assert not features.importance.requires_grad
    assert features.cell_logits.shape == (2, 16, 5)
    padding = features.importance[1] == 0
    assert int(padding.sum()) == 16 - 9
    assert not bool(features.cell_logits[1][padding].any())
    labelled = torch.stack([torch.ones(16, dtype=torch.bool), ~padding])
    target = torch.zeros(2, 16, 5)
    target[..., 1] = 1
    loss = model.gate.cell_loss(features.cell_logits, target, labelled)
    every = torch.nn.functional.binary_cross_entropy_with_logits(features.cell_logits[labelled], target[labelled])
    torch.testing.assert_close(loss, every)
    loss.backward()
    for parameter in (model.gate.fc.weight, model.gate.fc.bias, model.encoder.layers[0].mixer.in_proj.weight):
        assert bool(parameter.grad.any())
    assert model.eval().forward_scope(torch.randn(1, 3, 64, 64)).cell_logits is None


def test_evidence_marks_the_cells_of_objects():
    """A few steps on squares of two colours among textured squares that are no objects."""
    torch.manual_seed(0)
    model = scope(gate={"num_classes": 2}, arch_options={"score_metric": "evidence", "alpha": 0.25})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def scenes(count):
        images, target = 0.1 * torch.randn(count, 3, 64, 64), torch.zeros(count, 16, 2)
        for image, cells in zip(images, target, strict=True):
            for n, cell in enumerate(torch.randperm(16)[:6].tolist()):
                row, col = (16 * i for i in divmod(cell, 4))
                part = image[:, row + 2 : row + 14, col + 2 : col + 14]
                if n < 3:
                    part[n % 2] += 2.0
                    cells[cell, n % 2] = 1
                else:
                    part += 2 * torch.randn_like(part)
        return images, target

    def hits():
        images, target = scenes(64)
        with torch.no_grad():
            chosen = model.eval().forward_scope(images).importance.topk(4).indices
        return float(target.amax(2).gather(1, chosen).sum() / target.amax(2).sum())

    before = hits()
    for _ in range(40):
        images, target = scenes(16)
        features = model.train().forward_scope(images)
        model.gate.cell_loss(features.cell_logits, target, torch.ones(16, 16, dtype=torch.bool)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.6
    assert hits() > 0.9


# ---- gates ---------------------------------------------------------------------------------------------------------


class ImageGate(DenseGate):
    """Classes of whole images only."""

    def __init__(self, dim, **options):
        super().__init__(**options)
        self.fc = nn.Linear(dim, self.num_classes)

    def logits(self, coarse):
        return self.fc(coarse.features.mean(1))


class CellGate(ImageGate):
    """The image has what its cells have."""

    def __init__(self, dim, hidden=7, **options):
        super().__init__(dim, **options)
        self.fc = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, self.num_classes))

    def logits(self, coarse):
        return self.cell_logits(coarse.features).amax(1)

    def cell_logits(self, features):
        return self.fc(features)


class WrongGate(CellGate):
    """One class too many."""

    def cell_logits(self, features):
        return torch.cat([self.fc(features), features[..., :1]], -1)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (None, "score_metric='evidence' asks a gate what is in each cell: .* got none"),
        ({"type": ImageGate, "num_classes": 3}, "with cell_logits, got a ImageGate without"),
        ({"type": WrongGate, "num_classes": 3}, r"cell_logits of WrongGate must give \[1, 1, 3\] .*got \[1, 1, 4\]"),
    ],
)
def test_gates_that_cannot_tell_cells(gate, message):
    with pytest.raises(ValueError, match=message):
        scope(gate=gate, **EVIDENCE)
    if gate is not None:  # other scores do not ask
        scope(gate=gate)


@torch.no_grad()
@pytest.mark.parametrize("gate", [{"num_classes": 5}, {"type": CellGate, "num_classes": 5}])
def test_what_is_asked_about_cells_is_counted(gate):
    asking, plain = scope(gate=gate, **EVIDENCE).eval(), scope(gate=gate).eval()
    x = torch.randn(1, 3, 64, 96)
    width = asking.encoder.embed_dim
    of_a_cell = 5 * width if "type" not in gate else 7 * width + 5 * 7
    for i, threshold in enumerate((0.0, 1.0)):
        asking.threshold = plain.threshold = threshold
        extra = count_macs(asking, x) - count_macs(plain, x)
        assert extra == 24 * of_a_cell
        assert round(1e9 * (asking.cost(64, 96)[i] - plain.cost(64, 96)[i])) == extra


def test_gates_keep_their_weights():
    """Files of models that ranked cells otherwise load as they are."""
    before, after = scope(), scope(**EVIDENCE)
    after.load_state_dict(before.state_dict())
    assert torch.equal(before.gate.fc.weight, after.gate.fc.weight)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(before.eval().forward_scope(x).gate_logits, after.eval().forward_scope(x).gate_logits)


def test_the_look_is_exported_with_its_importance():
    class Coarse(nn.Module):
        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, x):
            state = self.backbone.encoder.forward_coarse(x, presence=self.backbone.gate.cell_presence)
            return self.backbone.gate(state), state.importance

    model = Coarse(scope(arch_options={"score_metric": "evidence_contrast"})).eval()
    nn.init.normal_(model.backbone.gate.fc.weight)
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,)).module()
    other = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(program(other), model(other), strict=True):
            torch.testing.assert_close(a, b)


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["seg", "det"])
def test_a_step_of_training_teaches_cells(kind, tmp_path):
    data = common.make_data(kind, tmp_path / "data", train=4, val=2)
    options = {"model.backbone.arch_options.score_metric": "evidence_contrast", "train_cfg.max_iters": 1}
    runner = common.runner(kind, data, tmp_path / "run", **options)
    model = runner.model.train()
    batch = model.data_preprocessor(next(iter(runner.train_dataloader)), True)
    losses = model.loss(batch["inputs"], batch["data_samples"])
    features = model.backbone.forward_scope(batch["inputs"])
    presence, labelled = model.cell_presence(batch["data_samples"], features)
    assert presence.shape == features.cell_logits.shape
    assert bool(labelled.all())
    of_images, _ = model.presence(batch["data_samples"])
    assert torch.equal(presence.amax(1), of_images)  # what is in an image is in one of its cells
    expected = model.backbone.gate.cell_loss(features.cell_logits, presence, labelled)
    torch.testing.assert_close(losses["loss_cells"], expected)
    losses["loss_cells"].backward()
    assert bool(model.backbone.gate.fc.weight.grad.any())
