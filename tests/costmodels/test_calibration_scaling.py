"""Calibrations of parts that do not exist."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.calibration_choice import load_device_calibration
from meshwright.costmodels.calibration_scaling import carried_calibration, scaled_calibration
from meshwright.costmodels.collectives import collective_time, place_group
from meshwright.hardware_specs.catalog import load_gpu, resolve_cluster

H100 = load_gpu("h100-sxm-80")
CLUSTER = resolve_cluster("dgx-h100:1")


def all_reduce(calibration, num_bytes, ranks=8.0):
    sizes = np.array([num_bytes])
    group = place_group(np.array([ranks]), np.array([1.0]), 8)
    return float(collective_time("all_reduce", sizes, group, CLUSTER, calibration, 0.8)[0])


def test_the_same_data_sheet_keeps_its_calibration():
    calibration = load_device_calibration(H100)
    assert carried_calibration(calibration, H100, replace(H100, memory_bytes=1e11)) is calibration


def test_another_peak_moves_rooflines_and_attention_and_the_basis():
    calibration = load_device_calibration(H100)
    peaks = {name: 2.0 * peak for name, peak in H100.peak_flops_per_second.items()}
    faster = carried_calibration(calibration, H100, replace(H100, peak_flops_per_second=peaks))
    assert faster.gemm("bf16").rates.peak_flops_per_second == pytest.approx(
        2.0 * calibration.gemm("bf16").rates.peak_flops_per_second
    )
    for kernel, curve in calibration.attention.items():
        assert faster.attention[kernel].peak_flops_per_second == pytest.approx(
            2.0 * curve.peak_flops_per_second
        )
    assert faster.sustained_clock == calibration.sustained_clock
    assert (calibration.basis, faster.basis) == ("calibrated", "prior of the same generation")
    assert faster.is_estimate


def test_a_data_sheet_only_stays_one():
    gpu = load_gpu("mi300x")
    calibration = load_device_calibration(gpu)
    changed = carried_calibration(calibration, gpu, replace(gpu, memory_bandwidth_bytes_per_second=1e13))
    assert changed.basis == "data sheet only"
    assert changed.gemm("bf16").rates.bandwidth_bytes_per_second == 1e13


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_small_messages_follow_the_latency_and_large_ones_do_not(factor):
    calibration = load_device_calibration(H100)
    scaled = scaled_calibration(calibration, collective_latency=factor)
    assert all_reduce(scaled, 1e3) / all_reduce(calibration, 1e3) == pytest.approx(factor, rel=0.1)
    assert all_reduce(scaled, 8e9) / all_reduce(calibration, 8e9) == pytest.approx(1.0, rel=0.06)


def test_scaling_there_and_back_changes_nothing():
    calibration = load_device_calibration(H100)
    there = scaled_calibration(calibration, collective_latency=3.0, launch_time=5.0)
    back = scaled_calibration(there, collective_latency=1.0 / 3.0, launch_time=0.2)
    for num_bytes in (1e3, 1e6, 1e9):
        assert all_reduce(back, num_bytes) == pytest.approx(all_reduce(calibration, num_bytes))
    assert there.gemm_curve("bf16").launch_time == pytest.approx(
        5.0 * calibration.gemm_curve("bf16").launch_time
    )
    assert back.gemm_curve("bf16").launch_time == pytest.approx(calibration.gemm_curve("bf16").launch_time)


def test_no_factor_no_change():
    calibration = load_device_calibration(H100)
    assert scaled_calibration(calibration) is calibration
