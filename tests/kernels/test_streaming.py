"""Copy and triad: what they refuse; test_accuracy.py holds what they compute."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.streaming import stream_copy, stream_triad  # noqa: E402 - after the skip


def test_triad_of_integers_is_exact_in_every_type():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = torch.arange(7, dtype=dtype), torch.full((7,), 2, dtype=dtype)
        out = torch.empty_like(a)
        stream_triad(out, a, b, scale=3)
        assert out.tolist() == [6, 7, 8, 9, 10, 11, 12]


def test_copy_refuses_another_shape():
    with pytest.raises(SpecError, match=r"stream_copy: x has shape \(3,\); pass one shape .* \(4\)"):
        stream_copy(torch.empty(4), torch.empty(3))


def test_copy_refuses_another_type():
    with pytest.raises(SpecError, match=r"x is torch.float16; convert it to one of torch.float32"):
        stream_copy(torch.empty(4), torch.empty(4, dtype=torch.float16))


def test_copy_refuses_integers():
    with pytest.raises(SpecError, match=r"out is torch.int32; convert it to one of torch.bfloat16"):
        stream_copy(torch.empty(4, dtype=torch.int32), torch.empty(4, dtype=torch.int32))


def test_triad_refuses_gaps_in_memory():
    x = torch.empty(4)
    with pytest.raises(SpecError, match=r"b has strides \(2,\); pass b.contiguous\(\)"):
        stream_triad(x, x, torch.empty(8)[::2], 1.0)


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(SpecError, match=r"out on 'cpu', x on 'meta'; move all of them to one device"):
        stream_copy(torch.empty(4), torch.empty(4, device="meta"))


def test_a_device_without_kernels_is_refused():
    x = torch.empty(4, device="meta")
    with pytest.raises(SpecError, match=r"no kernel for device 'meta'; move the tensors to 'cpu' or 'cuda'"):
        stream_copy(x, x)
