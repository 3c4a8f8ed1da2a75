from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.serving.kernels import ExpertTable, ServingKernels, load_serving_kernels
from meshwright.hardware_specs.catalog import resolve_cluster

Load = Callable[[str, str], ServingKernels]


def gemm_shape(m: float) -> dict[str, np.ndarray]:
    return {"m": np.array([m]), "n": np.array([8192.0]), "k": np.array([8192.0])}


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("gpu", ["h100", "h200", "b200"])
def test_block_scaled_products_wait_for_no_host(kernels: Load, gpu: str, engine: str) -> None:
    loaded = kernels(gpu, engine)
    narrow, wide = (loaded.gemm_time(name, gemm_shape(64.0))[0] for name in ("fp8_block", "bf16"))
    assert 0.3 * wide < narrow < wide


def test_published_models_read_their_own_tables(kernels: Load) -> None:
    loaded = kernels("h100", "trtllm")
    fields = (4096.0, 1536.0, 8.0, 128.0, 1.0, 4.0)
    names = ("hidden_size", "moe_ffn_hidden_size", "top_k", "num_experts", "tp", "ep")
    table = loaded.expert_tables["fp8_block", tuple(int(field) for field in fields)]
    tokens = table.num_tokens
    shape = {name: np.full_like(tokens, field) for name, field in zip(names, fields, strict=True)}
    shape |= {"num_tokens": tokens, "skew": np.full_like(tokens, 1.01)}
    np.testing.assert_allclose(loaded.expert_time("fp8_block", shape), table.seconds)
    other = {**shape, "hidden_size": np.full_like(tokens, 4224.0)}
    fitted = loaded.expert_time("fp8_block", other)
    assert (fitted / table.seconds).min() > 0.5
    assert (fitted / table.seconds).max() < 2.0


def test_an_expert_table_is_flat_below_and_proportional_above() -> None:
    table = ExpertTable(num_tokens=np.array([2.0, 8.0]), seconds=np.array([1.0, 4.0]))
    np.testing.assert_allclose(table.time(np.array([1.0, 4.0, 32.0])), [1.0, 2.0, 16.0])


def test_a_device_without_tables_borrows_those_of_its_architecture() -> None:
    cluster = resolve_cluster("hgx-h20:1")
    borrowed = load_serving_kernels(cluster.gpu, cluster.node, "vllm")
    assert not borrowed.expert_tables
    assert borrowed.all_reduce
    rates = borrowed.gemm("bf16").rates
    assert rates.peak_flops_per_second == cluster.gpu.peak("bf16")


def test_times_are_computed_once(kernels: Load) -> None:
    loaded = kernels("h100", "vllm")
    first = loaded.gemm_time("bf16", gemm_shape(77.0))
    assert loaded.gemm_time("bf16", gemm_shape(77.0)) is first


def test_the_users_calibration_wins(tmp_path: Path, kernels: Load) -> None:
    path = tmp_path / "mine.json"
    path.write_text(
        '{"schema_version": 2, "kind": "calibration", "written_by": "meshwright", "gpu": "h100-sxm-80",'
        ' "software": {"serving-vllm": {"step_latency": 0.004}}}'
    )
    cluster = resolve_cluster("dgx-h100:1")
    mine = load_serving_kernels(cluster.gpu, cluster.node, "vllm", (path,))
    assert mine.calibration.software["serving-vllm"]["step_latency"] == 0.004
    ours = kernels("h100", "vllm")
    for name in ("bf16", "fp8", "fp8_block"):
        np.testing.assert_allclose(
            mine.gemm_time(name, gemm_shape(64.0)), ours.gemm_time(name, gemm_shape(64.0))
        )
    assert mine.expert_tables.keys() == ours.expert_tables.keys()


def test_an_engine_runs_its_own_experts_unless_they_are_spread_widely(kernels: Load) -> None:
    sglang, trtllm = (kernels("b200", engine).expert_tables for engine in ("sglang", "trtllm"))
    model = (7168, 2048, 8, 256, 1)
    prompt = np.array([8192.0])
    narrow, wide = (("fp8_block", (*model, ep)) for ep in (8, 32))
    assert sglang[narrow].time(prompt)[0] > 2.0 * trtllm[narrow].time(prompt)[0]
    assert sglang[wide].time(prompt)[0] <= trtllm[wide].time(prompt)[0]
