"""Dispatch on the CPU: the order, the way back, and what is refused."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.grouped_gemm import grouped_gemm  # noqa: E402 - after the skip
from meshwright.kernels.permute import expert_order, permute_tokens, unpermute_tokens  # noqa: E402


def test_rows_of_one_expert_keep_the_order_of_tokens():
    order = expert_order(torch.tensor([[2, 0], [0, 2], [2, 0]]), num_experts=4)
    assert order.destinations.tolist() == [[3, 0], [1, 4], [5, 2]]
    assert order.group_sizes.tolist() == [3, 0, 3, 0]


def test_there_and_back_with_weights_that_sum_to_one_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator)
    ids = torch.stack([torch.randperm(8, generator=generator)[:4] for _ in range(20)])
    order = expert_order(ids, num_experts=8)
    weights = torch.softmax(torch.randn(20, 4, generator=generator), dim=1)
    torch.testing.assert_close(unpermute_tokens(permute_tokens(x, order), order, weights), x)


def test_dispatch_product_and_return_equal_a_loop_over_tokens():
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(9, 4, generator=generator), torch.randn(3, 4, 4, generator=generator)
    ids = torch.tensor([[0, 2]] * 9)  # expert 1 has no tokens
    routing = torch.rand(9, 2, generator=generator)
    order = expert_order(ids, num_experts=3)
    rows = grouped_gemm(permute_tokens(x, order), weights, order.group_sizes)
    expected = torch.stack(
        [
            sum(routing[token, choice] * (x[token] @ weights[ids[token, choice]]) for choice in range(2))
            for token in range(9)
        ]
    )
    torch.testing.assert_close(unpermute_tokens(rows, order, routing), expected)


def test_no_tokens_go_nowhere():
    order = expert_order(torch.empty(0, 2, dtype=torch.int64), num_experts=3)
    assert order.group_sizes.tolist() == [0, 0, 0]
    rows = permute_tokens(torch.ones(0, 5), order)
    assert rows.shape == (0, 5)
    assert unpermute_tokens(rows, order, torch.ones(0, 2)).shape == (0, 5)


@pytest.mark.parametrize("expert", [-1, 3])
def test_an_expert_that_does_not_exist_is_refused_on_the_cpu(expert):
    with pytest.raises(SpecError, match=r"expert_ids lie in .*; pass 0 to 2"):
        expert_order(torch.tensor([[0, expert]]), num_experts=3)


def test_shapes_and_types_that_do_not_fit_are_refused():
    order = expert_order(torch.tensor([[0, 1], [1, 0]]), num_experts=2)
    with pytest.raises(SpecError, match="num_experts is 0; pass at least 1"):
        expert_order(torch.tensor([[0]]), num_experts=0)
    with pytest.raises(SpecError, match=r"expert_ids has shape \(1,\); pass \(num_tokens, top_k\)"):
        expert_order(torch.tensor([0]), num_experts=2)
    with pytest.raises(SpecError, match=r"expert_ids is torch.float32"):
        expert_order(torch.tensor([[0.0]]), num_experts=2)
    with pytest.raises(SpecError, match=r"x has shape \(3, 5\); pass \(num_tokens, hidden_size\)"):
        permute_tokens(torch.ones(3, 5), order)
    with pytest.raises(
        SpecError, match=r"rows has shape \(3, 5\); pass \(num_tokens \* top_k, hidden_size\)"
    ):
        unpermute_tokens(torch.ones(3, 5), order, torch.ones(2, 2))
    with pytest.raises(SpecError, match=r"routing_weights has shape \(2, 1\); pass \(num_tokens, top_k\)"):
        unpermute_tokens(torch.ones(4, 5), order, torch.ones(2, 1))
    with pytest.raises(SpecError, match=r"routing_weights is torch.int64"):
        unpermute_tokens(torch.ones(4, 5), order, torch.ones(2, 2, dtype=torch.int64))
