"""Products on a processor: in the one format asked for, with operands that its caches do not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from meshwright.profiler.device import Device
from meshwright.profiler.settings import quick_settings
from meshwright.profiler.suites import gemm
from meshwright.simcore.domain.model_catalog import load_model

CPU = Device(
    type="cpu",
    name="a processor",
    gpu="cpu-host",
    num_devices=1,
    num_sms=1,
    memory_bytes=2.0**34,
    l2_bytes=2.0**25,
)


def cases(**changes):
    settings = replace(quick_settings(load_model("qwen2.5-0.5b")), **changes)
    return list(gemm.SUITE.cases(CPU, settings))


def test_a_single_format_gets_all_that_16_bits_get():
    def counts(precision):
        found = [case for case in cases(precisions=(precision,)) if case.precision == precision]
        names = ("gemm", "gemm_dgrad", "gemm_wgrad")
        return {name: sum(case.operator == name for case in found) for name in names}

    assert counts("fp32")["gemm_dgrad"] > 0
    assert counts("fp32")["gemm"] == pytest.approx(counts("bf16")["gemm"], rel=0.2)


@pytest.mark.parametrize("operator", ["gemm", "gemm_dgrad", "gemm_wgrad"])
def test_operands_take_turns_until_they_exceed_the_caches(monkeypatch, operator):
    seen = []
    monkeypatch.setattr(gemm, "_product", lambda a, b, out: seen.append((a, b, out)))
    shape = {"m": 256.0, "n": 512.0, "k": 128.0}
    (case,) = gemm._cases(operator, "fp32", [shape], CPU)
    product = case.prepare()
    while len(seen) < 2 or seen[-1][0] is not seen[0][0]:
        product()
    sets = seen[:-1]
    assert len({a.data_ptr() for a, _, _ in sets}) == len(sets)
    assert sum(each.numel() * 4 for operands in sets for each in operands) >= 8 * 2**20
    first, second = sets[:2]
    for mine, other in zip(first[:2], second[:2], strict=True):
        assert mine.stride() == other.stride()
        assert torch.equal(mine, other)
