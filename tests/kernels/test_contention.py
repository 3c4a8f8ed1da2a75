"""Contention on the CPU: bytes, rounds, and what is refused."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.contention import stream_contention  # noqa: E402 - after the skip


def test_every_round_adds_once_and_moves_three_tensors():
    out, x = torch.zeros(5), torch.arange(5.0)
    assert stream_contention(out, x, num_programs=2, num_rounds=4) == 3 * 5 * 4 * 4
    assert out.tolist() == [0.0, 4.0, 8.0, 12.0, 16.0]


def test_no_rounds_move_nothing():
    out = torch.zeros(5)
    assert stream_contention(out, torch.ones(5), num_programs=1, num_rounds=0) == 0
    assert out.tolist() == [0.0] * 5


def test_what_does_not_fit_is_refused():
    out = torch.zeros(5)
    with pytest.raises(SpecError, match=r"x has shape \(4,\); pass the shape of out"):
        stream_contention(out, torch.ones(4), num_programs=1, num_rounds=1)
    with pytest.raises(SpecError, match=r"out is torch.float16"):
        stream_contention(out.half(), out.half(), num_programs=1, num_rounds=1)
    with pytest.raises(SpecError, match="num_programs is 0 and num_rounds is 1; pass at least 1 and 0"):
        stream_contention(out, out, num_programs=0, num_rounds=1)
    with pytest.raises(SpecError, match="num_programs is 1 and num_rounds is -1"):
        stream_contention(out, out, num_programs=1, num_rounds=-1)
