"""Row gathers: what they return and refuse on the CPU."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.gather import gather_rows, strided_gather  # noqa: E402 - after the skip


def test_rows_may_repeat_in_any_order():
    x = torch.arange(12.0).reshape(4, 3)
    assert gather_rows(x, torch.tensor([3, 0, 3], dtype=torch.int32))[:, 0].tolist() == [9.0, 0.0, 9.0]


def test_a_stride_takes_the_first_row_and_every_nth_after_it():
    x = torch.arange(10.0).reshape(10, 1)
    assert strided_gather(x, 4).flatten().tolist() == [0.0, 4.0, 8.0]
    assert strided_gather(x, 1).flatten().tolist() == x.flatten().tolist()
    assert strided_gather(x[:0], 4).shape == (0, 1)


def test_no_indices_gather_no_rows():
    assert gather_rows(torch.ones(4, 3), torch.tensor([], dtype=torch.int64)).shape == (0, 3)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_table_is_refused_on_the_cpu(index):
    with pytest.raises(SpecError, match=rf"indices holds {index}; pass rows 0 to 3 of x"):
        gather_rows(torch.ones(4, 3), torch.tensor([0, index]))


def test_indices_must_be_integers_of_one_dim():
    x = torch.ones(4, 3)
    with pytest.raises(SpecError, match=r"indices is torch.float32; convert it to one of torch.int32"):
        gather_rows(x, torch.tensor([0.0]))
    with pytest.raises(SpecError, match=r"indices has shape \(1, 1\); pass \(num_out,\)"):
        gather_rows(x, torch.tensor([[0]]))


def test_a_table_has_two_dims():
    with pytest.raises(SpecError, match=r"x has shape \(4,\); pass \(num_rows, row_width\)"):
        strided_gather(torch.ones(4), 1)


def test_a_stride_is_at_least_one():
    with pytest.raises(SpecError, match="stride is 0; pass at least 1"):
        strided_gather(torch.ones(4, 3), 0)
