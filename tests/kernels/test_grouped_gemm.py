"""The grouped product on the CPU: empty groups, and what it refuses."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.grouped_gemm import _tile, grouped_gemm  # noqa: E402 - after the skip


def test_each_token_meets_the_weights_of_its_expert():
    x = torch.ones(5, 2)
    weights = torch.tensor([1.0, 10.0, 100.0]).reshape(3, 1, 1).expand(3, 2, 1)
    out = grouped_gemm(x, weights, torch.tensor([2, 0, 3]))
    assert out.flatten().tolist() == [2.0, 2.0, 200.0, 200.0, 200.0]


def test_no_tokens_give_no_products():
    out = grouped_gemm(torch.ones(0, 2), torch.ones(3, 2, 4), torch.zeros(3, dtype=torch.int64))
    assert out.shape == (0, 4)
    assert out.dtype == torch.float32


def test_bf16_products_are_summed_in_fp32():
    # In bf16, 256 + 1 is 256: a sum in bf16 would stay there.
    x = torch.ones(1, 512, dtype=torch.bfloat16)
    out = grouped_gemm(x, torch.ones(1, 512, 1, dtype=torch.bfloat16), torch.tensor([1]))
    assert out.item() == 512.0


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [4, -1]])
def test_sizes_that_do_not_cover_the_tokens_are_refused_on_the_cpu(sizes):
    with pytest.raises(SpecError, match=r"group_sizes sum to .* for 3 tokens; pass how many rows"):
        grouped_gemm(torch.ones(3, 2), torch.ones(2, 2, 4), torch.tensor(sizes))


@pytest.mark.parametrize(
    ("x", "weights", "sizes", "message"),
    [
        ((3,), (2, 2, 4), (2,), r"x has shape \(3,\); pass \(num_tokens, k\)"),
        ((3, 2), (2, 5, 4), (2,), r"weights has shape .* pass \(num_experts, k, n\).*\(any, 2, any\)"),
        ((3, 2), (2, 2, 4), (3,), r"group_sizes has shape .* pass \(num_experts,\)"),
        ((3, 2), (0, 2, 4), (0,), "pass 1 to 4096 experts and no empty dim"),
        ((3, 2), (2, 2, 0), (2,), "pass 1 to 4096 experts and no empty dim"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, weights, sizes, message):
    with pytest.raises(SpecError, match=message):
        grouped_gemm(torch.ones(x), torch.ones(weights), torch.ones(sizes, dtype=torch.int64))


def test_types_that_do_not_fit_are_refused():
    x, weights, sizes = torch.ones(2, 2), torch.ones(1, 2, 2), torch.tensor([2])
    with pytest.raises(SpecError, match=r"weights is torch.float16; convert it to one of torch.float32"):
        grouped_gemm(x, weights.half(), sizes)
    with pytest.raises(SpecError, match=r"group_sizes is torch.float32"):
        grouped_gemm(x, weights, sizes.float())


def test_smaller_groups_have_lower_tiles():
    heights = [_tile(num_tokens, 8, torch.bfloat16).block_m for num_tokens in (8, 128, 512, 1024)]
    assert heights == [16, 16, 64, 128]
