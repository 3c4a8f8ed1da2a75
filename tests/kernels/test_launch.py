"""The empty kernel leaves its tensor alone."""

from __future__ import annotations

import pytest

from meshwright.errors import SpecError

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")

from meshwright.kernels.launch import empty_launch  # noqa: E402 - after the skip


def test_an_empty_launch_changes_nothing():
    x = torch.arange(3.0)
    empty_launch(x)
    assert x.tolist() == [0.0, 1.0, 2.0]


def test_a_device_without_kernels_is_refused():
    with pytest.raises(SpecError, match="empty_launch: no kernel for device 'meta'"):
        empty_launch(torch.empty(1, device="meta"))
