"""Serving kernels of devices that do not exist: nothing changes by itself, and each number moves what rests on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.costmodels.serving.carried import carried_kernels
from meshwright.costmodels.serving.kernels import load_serving_kernels
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.model_catalog import load_model

NODE = resolve_cluster("dgx-h200:1").node
MODEL = load_model("gpt-oss-120b")


@pytest.fixture(scope="module")
def kernels():
    return load_serving_kernels(NODE.gpu, NODE, "vllm")


def test_a_device_as_measured_keeps_its_kernels(kernels):
    assert carried_kernels(kernels, MODEL, NODE.gpu, NODE.gpu) is kernels


def test_memory_alone_moves_no_time(kernels):
    gpu = replace(NODE.gpu, memory_bytes=1e11)
    carried = carried_kernels(kernels, MODEL, NODE.gpu, gpu)
    for key, table in carried.expert_tables.items():
        assert table.seconds == pytest.approx(kernels.expert_tables[key].seconds)
    for size, table in carried.all_reduce.items():
        assert table.seconds == pytest.approx(kernels.all_reduce[size].seconds)


def test_curves_of_the_models_experts_follow_the_memory_bandwidth(kernels):
    gpu = replace(
        NODE.gpu, memory_bandwidth_bytes_per_second=2.0 * NODE.gpu.memory_bandwidth_bytes_per_second
    )
    carried = carried_kernels(kernels, MODEL, NODE.gpu, gpu)
    assert carried.expert_tables
    for key, table in carried.expert_tables.items():
        ratio = table.seconds / kernels.expert_tables[key].seconds
        # Never more than twice as quick; few tokens wait for their experts' weights.
        assert 0.45 <= ratio.min() < 0.97
    assert {key[1][:4] for key in carried.expert_tables} == {
        (MODEL.hidden_size, MODEL.moe.moe_ffn_hidden_size, MODEL.moe.top_k, MODEL.moe.num_experts)
    }


def test_one_shot_all_reduces_follow_latency_and_links(kernels):
    link = NODE.gpu.scale_up
    assert kernels.all_reduce
    halved = replace(
        NODE.gpu, scale_up=replace(link, bandwidth_bytes_per_second=link.bandwidth_bytes_per_second / 2)
    )
    narrow = carried_kernels(kernels, MODEL, NODE.gpu, halved)
    late = carried_kernels(kernels, MODEL, NODE.gpu, NODE.gpu, collective_latency=2.0)
    for size, table in kernels.all_reduce.items():
        start = table.seconds.min()
        assert narrow.all_reduce[size].seconds == pytest.approx(start + 2.0 * (table.seconds - start))
        assert late.all_reduce[size].seconds == pytest.approx(table.seconds + start)
        assert np.all(np.diff(narrow.all_reduce[size].seconds) >= 0.0)
