import pytest
import torch

from mambascope.layers import gather_rows


@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 4), (1, 6, 2), (3, 5, 2, 4)])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_rows_and_gradients_are_those_of_plain_indexing(shape, count):
    torch.manual_seed(0)
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    index = torch.stack([torch.randperm(shape[1])[:count] for _ in range(shape[0])])
    gathered = gather_rows(rows, index)
    expected = rows[torch.arange(shape[0]).unsqueeze(1), index]
    assert torch.equal(gathered, expected)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * weights).sum(), rows, retain_graph=True)[0] for out in (gathered, expected)]
    assert torch.equal(*grads)


def test_a_shared_table_serves_every_sequence():
    table, index = torch.randn(1, 6, 3), torch.tensor([[5, 0], [2, 2], [1, 4]])
    assert torch.equal(gather_rows(table, index), table[0][index])


def test_no_rows_out_of_no_rows():
    assert gather_rows(torch.zeros(3, 0, 5), torch.zeros(3, 0, dtype=torch.long)).shape == (3, 0, 5)
