"""Packed products and the packed stack of blocks against the formulas, at every instruction level."""

import threading

import pytest
import torch
import torch.nn.functional as F

from mambascope.ops.native import library
from mambascope.ops.native.stack import BlockWeights, DirectionWeights, PackedStack, _shares
from tests.conftest import relative_error

pytestmark = pytest.mark.skipif(library.why_unavailable() is not None, reason="kernels were not compiled")


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 12, 13, 37])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (3, 17), (40, 38), (96, 33), (7, 64)])
@pytest.mark.parametrize("threads", [1, 3])
def test_products_of_every_shape(level, rows, depth, columns, threads):
    x, weight = torch.randn(rows, depth + 5)[:, 2 : 2 + depth], torch.randn(columns, depth)
    out = torch.full((rows, columns + 3), 7.0)
    packed = library.get().packed_weight(weight)
    sizes = (rows, depth, columns, threads, x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), out.stride(0))
    library.get().run("gemm", library.GEMM.pack(*sizes))
    assert relative_error(out[:, :columns], x.double() @ weight.double().T) < 1e-6
    assert (out[:, columns:] == 7).all()  # nothing beyond the last column is written


def test_a_nan_reaches_its_row_and_no_other(level):
    x, weight = torch.randn(9, 20), torch.randn(17, 20)
    x[4, 3] = float("nan")
    out = torch.empty(9, 17)
    packed = library.get().packed_weight(weight)
    sizes = (9, 20, 17, 1, x.data_ptr(), 20, packed.data_ptr(), out.data_ptr(), 17)
    library.get().run("gemm", library.GEMM.pack(*sizes))
    assert out[4].isnan().all()
    assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


def weights(dim, inner, states, rank, taps=4, conv_bias=True):
    def direction():
        return DirectionWeights(
            conv_weight=torch.randn(inner, 1, taps) * 0.4,
            conv_bias=torch.randn(inner) * 0.1 if conv_bias else None,
            x_proj=torch.randn(rank + 2 * states, inner) * inner**-0.5,
            dt_weight=torch.randn(inner, rank) * rank**-0.5,
            dt_bias=torch.randn(inner) - 3,
            A=-torch.rand(inner, states) * states,
            D=torch.randn(inner),
        )

    return BlockWeights(
        norm=(torch.rand(dim) + 0.5, 1e-5),
        in_proj=torch.randn(2 * inner, dim) * dim**-0.5,
        out_proj=torch.randn(dim, inner) * inner**-0.5,
        directions=(direction(), direction()),
    )


def by_formula(blocks, final, tokens):
    """Float64, token after token: outputs, streams after each block, largest SSM outputs."""

    def norm(x, gain, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.double()

    def scan(d, x):
        inner, taps = x.shape[-1], d.conv_weight.shape[-1]
        padded = F.pad(x.transpose(1, 2), (taps - 1, 0))
        bias = None if d.conv_bias is None else d.conv_bias.double()
        x = F.silu(F.conv1d(padded, d.conv_weight.double(), bias, groups=inner).transpose(1, 2))
        rank, states = d.dt_weight.shape[1], d.A.shape[1]
        low, b, c = (x @ d.x_proj.double().T).split([rank, states, states], dim=-1)
        dt = F.softplus(low @ d.dt_weight.double().T + d.dt_bias.double())
        h, ys = x.new_zeros(len(x), inner, states), []
        for t in range(x.shape[1]):
            step = dt[:, t].unsqueeze(-1)
            h = torch.exp(step * d.A.double()) * h + step * x[:, t].unsqueeze(-1) * b[:, t].unsqueeze(1)
            ys.append((h * c[:, t].unsqueeze(1)).sum(-1) + d.D.double() * x[:, t])
        return torch.stack(ys, 1)

    stream, streams, tops = tokens.double(), [], []
    for block in blocks:
        x, z = (norm(stream, *block.norm) @ block.in_proj.double().T).chunk(2, -1)
        forward, backward = block.directions
        y = scan(forward, x) + scan(backward, x.flip(1)).flip(1)
        tops.append(y.amax(-1))
        stream = stream + (0.5 * y * F.silu(z)) @ block.out_proj.double().T
        streams.append(stream)
    return (stream if final is None else norm(stream, *final)), streams, tops


SIZES = [(32, 64, 16, 2), (20, 38, 8, 3), (24, 33, 5, 1), (12, 7, 17, 2)]


@pytest.mark.parametrize(("dim", "inner", "states", "rank"), SIZES)
@pytest.mark.parametrize(("batch", "length", "threads"), [(1, 1, 1), (1, 37, 2), (3, 5, 2), (5, 70, 1), (9, 33, 2)])
def test_a_stack_is_the_formula(level, dim, inner, states, rank, batch, length, threads):
    torch.set_num_threads(threads)
    blocks = [weights(dim, inner, states, rank, taps, bias) for taps, bias in ((4, True), (4, False), (4, True))]
    final = (torch.rand(dim) + 0.5, 1e-6)
    tokens = torch.randn(batch, length, dim)
    output, streams, tops = by_formula(blocks, final, tokens)
    result = PackedStack(blocks, final)(tokens, take=(0, 2), top=(1,))
    assert relative_error(result.tokens, output) < 1e-5
    for stream, i in zip(result.taken, (0, 2), strict=True):
        assert relative_error(stream, streams[i]) < 1e-5
    assert relative_error(result.tops[0], tops[1]) < 1e-5


def test_stopping_early_and_no_final_norm(level):
    blocks, tokens = [weights(16, 32, 8, 1) for _ in range(3)], torch.randn(2, 9, 16)
    _, streams, _ = by_formula(blocks, None, tokens)
    stack = PackedStack(blocks, None)
    assert relative_error(stack(tokens).tokens, streams[2]) < 1e-5
    assert relative_error(stack(tokens, take=(2,)).tokens, streams[2]) < 1e-5
    early = PackedStack(blocks, (torch.ones(16), 1e-5))(tokens, take=(0, 1, 2), stop_after=1)
    assert relative_error(early.tokens, streams[1]) < 1e-5
    assert len(early.taken) == 2


def test_outputs_are_the_callers():
    blocks, stack = [weights(16, 32, 8, 1)], None
    stack = PackedStack(blocks, None)
    first = stack(torch.randn(1, 9, 16), take=(0,), top=(0,))
    copies = [t.clone() for t in (first.tokens, *first.taken, *first.tops)]
    stack(torch.randn(1, 9, 16), take=(0,), top=(0,))
    for kept, copy in zip((first.tokens, *first.taken, *first.tops), copies, strict=True):
        assert torch.equal(kept, copy)


def test_threads_of_python_share_a_stack():
    torch.set_num_threads(2)
    stack = PackedStack([weights(16, 32, 8, 1) for _ in range(2)], None)
    inputs = [torch.randn(1 + i % 3, 5 + i % 4, 16) for i in range(24)]
    alone = [stack(x).tokens for x in inputs]
    together: list = [None] * len(inputs)

    def work(start):
        torch.set_num_threads(2)
        for i in range(start, len(inputs), 4):
            together[i] = stack(inputs[i]).tokens

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_buffers_are_bounded(monkeypatch):
    from mambascope.ops.native import stack as module

    stack = PackedStack([weights(16, 32, 8, 1)], None)
    for length in range(1, 9):
        stack(torch.randn(1, length, 16))
    assert len(stack._plans) == 8
    monkeypatch.setattr(module, "_KEPT", 1)
    stack(torch.randn(1, 3, 16))
    assert len(stack._plans) == 1


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 17, 197, 5000])
def test_every_image_has_a_place(threads, length):
    for batch in range(1, 70):
        images, lanes, of_a_step = _shares(batch, length, threads)
        passes = -(-batch // images)
        assert images >= 1
        assert lanes * of_a_step in (lanes, threads)
        assert max(batch * (i + 1) // passes - batch * i // passes for i in range(passes)) <= images
