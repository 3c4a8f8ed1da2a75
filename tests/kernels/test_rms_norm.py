"""Residual addition and RMSNorm on the CPU: what they return and refuse."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.rms_norm import add_rms_norm  # noqa: E402 - after the skip


def test_rows_have_a_mean_square_of_one_before_the_weight():
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(4, 33, generator=generator) for _ in range(2))
    normalised, new_residual = add_rms_norm(x, residual, torch.full((33,), 3.0), epsilon=0.0)
    assert torch.equal(new_residual, x + residual)
    torch.testing.assert_close((normalised / 3.0).square().mean(dim=1), torch.ones(4))


def test_statistics_are_those_of_the_residual_as_stored():
    # In bf16, 256 + 1 is stored as 256, and 256 alone is normalised to 1.
    x, residual = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1, 1), 256, dtype=torch.bfloat16)
    normalised, new_residual = add_rms_norm(x, residual, torch.ones(1, dtype=torch.float32))
    assert new_residual.item() == 256.0
    assert normalised.item() == 1.0
    assert normalised.dtype == torch.bfloat16


def test_fp16_statistics_do_not_overflow():
    x = torch.full((1, 8), 1000, dtype=torch.float16)  # whose square is beyond fp16
    normalised, _ = add_rms_norm(x, torch.zeros_like(x), torch.ones(8, dtype=torch.float16))
    assert normalised.tolist() == [[1.0] * 8]


def test_a_row_of_zeros_stays_zero():
    x = torch.zeros(1, 8)
    assert add_rms_norm(x, x, torch.ones(8))[0].tolist() == [[0.0] * 8]


@pytest.mark.parametrize(
    ("x", "residual", "weight", "message"),
    [
        ((8,), (8,), (8,), r"x has shape \(8,\); pass \(num_tokens, hidden_size\)"),
        ((2, 8), (3, 8), (8,), r"residual has shape \(3, 8\); pass the shape of x"),
        ((2, 8), (2, 8), (7,), r"weight has shape \(7,\); pass \(hidden_size,\)"),
        ((2, 0), (2, 0), (0,), "hidden_size is 0; pass rows of 1 to 32768 elements"),
        ((1, 32769), (1, 32769), (32769,), "hidden_size is 32769; pass rows of 1 to 32768 elements"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, residual, weight, message):
    with pytest.raises(SpecError, match=message):
        add_rms_norm(torch.ones(x), torch.ones(residual), torch.ones(weight))


def test_another_type_of_residual_is_refused():
    x = torch.ones(2, 8)
    with pytest.raises(SpecError, match=r"residual is torch.float16; convert it to one of torch.float32"):
        add_rms_norm(x, x.half(), torch.ones(8))
