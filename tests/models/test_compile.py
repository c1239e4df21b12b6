"""torch.compile of both stages: whole graphs, and no recompilation without end when batches vary."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mambascope import MambaScope
from mambascope.models.export import stages

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_classes": 4, "alpha": 0.5}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    return MambaScope(**SMALL).eval()


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_stages_are_one_graph(model, name):
    module, inputs = stages(model, torch.randn(6, 3, 32, 32))[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        # twelve sizes of what is left to refine, as dynamic inference gives them
        for size in (6, 3, 5, 1, 2, 4, 6, 3, 1, 5, 2, 4):
            some = [t[:size].contiguous() for t in inputs]
            for value, expected in zip(compiled(*some), module(*some), strict=True):
                if value.is_floating_point():
                    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
                else:
                    assert torch.equal(value, expected)
    assert counter.frame_count <= 3  # the first size, any size, and one image


def test_bound_methods_compile_in_place(model):
    """What users write: the two stages of the model itself, dynamic inference around them."""
    x = torch.randn(9, 3, 32, 32)
    with torch.no_grad():
        conf = model.forward_scope(x, 1.0).confidence.sort().values
        eta = float((conf[4] + conf[5]) / 2)
        expected = model.forward_scope(x, eta)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward_coarse = torch.compile(model.forward_coarse, fullgraph=True, backend=counter)
    model.forward_fine = torch.compile(model.forward_fine, fullgraph=True, backend=counter)
    with torch.no_grad():
        out = model.forward_scope(x, eta)
        assert torch.allclose(out.logits, expected.logits, atol=1e-5)
        assert torch.equal(out.selected, expected.selected)
        for i in range(11):
            model.forward_scope(x[: 2 + i % 8], (eta, 0.99, 0.3)[i % 3])
    assert counter.frame_count <= 6


def test_training_compiles_too(model):
    model.train()
    x = torch.randn(3, 3, 32, 32)

    def loss(net):
        model.zero_grad()
        out = net(x)
        (out.coarse.square().sum() + out.fine.square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    expected = loss(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, grad in loss(compiled).items():
        assert torch.allclose(grad, expected[name], rtol=1e-3, atol=1e-5), name


def test_inductor_gives_the_same_answers():
    model = MambaScope(**SMALL).eval()
    module, inputs = stages(model, torch.randn(4, 3, 32, 32))["fine"]
    with torch.no_grad():
        result, expected = torch.compile(module, fullgraph=True)(*inputs), module(*inputs)
    assert torch.allclose(result[0], expected[0], atol=1e-5)
    assert torch.equal(result[1], expected[1])
