"""Trees of tables of made-up times in the layout of the package, and the installed package where there is one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from meshwright.costmodels.operators import OPERATORS
from meshwright.errors import CalibrationError, SpecError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.importers.aiconfigurator import ENGINES, SYSTEMS, read_aiconfigurator
from meshwright.profiler.measurements import Measurements, OperatorSamples

pd = pytest.importorskip("pandas", reason="the extra meshwright[aiconfigurator] is not installed")
pytest.importorskip("pyarrow", reason="the extra meshwright[aiconfigurator] is not installed")

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("aiconfigurator_core") is None,
    reason="the package aiconfigurator-core is not installed",
)

Row = Mapping[str, str | float]
GEMM: Row = {"gemm_dtype": "bfloat16", "kernel_source": "linear", "m": 1, "n": 32, "k": 64, "latency": 0.5}
ATTENTION: Row = {
    "kernel_source": "fa3",
    "batch_size": 2,
    "isl": 16,
    "num_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attn_dtype": "bfloat16",
    "kv_cache_dtype": "bfloat16",
    "step": 0,
    "window_size": 0,
    "latency": 0.5,
}
MLA: Row = {
    "mla_dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "num_heads": 16,
    "batch_size": 2,
    "isl": 1,
    "tp_size": 8,
    "step": 4095,
    "latency": 0.5,
}
MOE: Row = {
    "moe_dtype": "bfloat16",
    "kernel_source": "triton",
    "num_tokens": 7,
    "hidden_size": 2048,
    "inter_size": 768,
    "topk": 8,
    "num_experts": 128,
    "moe_tp_size": 2,
    "moe_ep_size": 4,
    "distribution": "balanced",
    "latency": 0.5,
}
NCCL: Row = {
    "nccl_dtype": "half",
    "op_name": "all_reduce",
    "num_gpus": 8,
    "message_size": 512,
    "latency": 0.02,
}


def write(root: Path, place: str, rows: Sequence[Row]) -> Path:
    path = root / "h200_sxm" / f"{place}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(rows)).to_parquet(path)
    return path


def read(
    root: Path, rows: Sequence[Row] = (GEMM,), place: str = "gemm/vllm/0.24.0/gemm_perf"
) -> Measurements:
    """What is read of one table of vllm."""
    write(root, place, rows)
    return read_aiconfigurator("h200_sxm", "vllm", root=root)


def only(measurements: Measurements, name: str | None = None) -> OperatorSamples:
    """The samples of the one operator there is (of this name)."""
    (samples,) = [each for each in measurements.operators if name in (None, each.name)]
    return samples


def names(measurements: Measurements) -> list[str]:
    return [samples.name for samples in measurements.operators]


def shape(samples: OperatorSamples) -> dict[str, list[float]]:
    return {field: column.tolist() for field, column in samples.shape.items()}


def test_milliseconds_become_seconds_and_source_and_inputs_name_the_table(tmp_path: Path) -> None:
    (tmp_path / "aiconfigurator_core-0.12.0.dist-info").mkdir()
    root = tmp_path / "aiconfigurator_core" / "systems" / "data"
    measurements = read(root)
    samples = only(measurements)
    assert (samples.name, samples.seconds.tolist()) == ("gemm.bf16", [5e-4])
    assert shape(samples) == {"m": [1.0], "n": [32.0], "k": [64.0]}
    assert samples.source == "aiconfigurator-core 0.12.0 (Apache-2.0): gemm, vllm 0.24.0"
    assert (measurements.gpu, measurements.kernels) == ("h200-sxm-141", "vllm 0.24.0")
    assert measurements.attribution == "aiconfigurator-core 0.12.0, NVIDIA, operator tables"
    assert measurements.licence == "Apache-2.0"
    name = "h200_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"
    assert measurements.inputs == ((name, sha256((root / name).read_bytes()).hexdigest(), 1),)


def test_fields_are_those_of_the_operators(tmp_path: Path) -> None:
    write(tmp_path, "attention/vllm/0.24.0/context_attention_perf", [ATTENTION])
    write(tmp_path, "attention/vllm/0.24.0/generation_attention_perf", [ATTENTION])
    write(tmp_path, "mla/vllm/0.24.0/context_mla_perf", [{**MLA, "step": 0}])
    write(tmp_path, "mla/vllm/0.24.0/generation_mla_perf", [MLA])
    write(tmp_path, "moe/vllm/0.24.0/moe_perf", [MOE])
    measurements = read(tmp_path)
    assert names(measurements) == [
        "gemm.bf16",
        "attention_prefill.bf16",
        "attention_decode.bf16",
        "mla_prefill.fp8_kv",
        "mla_decode.fp8_kv",
        "moe.bf16",
    ]
    for samples in measurements.operators:
        assert tuple(samples.shape) == OPERATORS[samples.operator].fields


def test_number_formats_get_our_names_and_foreign_ones_are_passed_over(tmp_path: Path) -> None:
    types = ("bfloat16", "float16", "fp8", "fp8_block", "mxfp8", "nvfp4", "int8_wo", "int4_wo", "sq")
    measurements = read(tmp_path, [{**GEMM, "gemm_dtype": name} for name in types])
    formats = {samples.precision for samples in measurements.operators}
    assert formats == {"bf16", "fp16", "fp8", "fp8_block", "mxfp8", "nvfp4"}


def test_a_shape_of_gemm_counts_by_the_median_of_all_its_rows(tmp_path: Path) -> None:
    rows = [
        {**GEMM, "kernel_source": kernel, "latency": t} for kernel, t in (("a", 1.0), ("b", 3.0), ("b", 9.0))
    ]
    samples = only(read(tmp_path, [*rows, {**GEMM, "m": 2, "latency": 5.0}]))
    assert shape(samples)["m"] == [1.0, 2.0]
    assert samples.seconds.tolist() == [3e-3, 5e-3]


@pytest.mark.parametrize("latency", [0.0, -1.0, float("nan"), float("inf")])
def test_rows_without_a_time_are_dropped(tmp_path: Path, latency: float) -> None:
    assert shape(only(read(tmp_path, [GEMM, {**GEMM, "m": 2, "latency": latency}])))["m"] == [1.0]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("0.9.1", "0.24.0"),
        ("1.3.0rc9", "1.3.0rc20"),
        ("1.3.0rc20", "1.3.0"),
        ("0.5.6", "0.5.6.post2"),
        ("0.5.6.post2", "0.5.10"),
        ("0.1.dev19262", "0.1"),
    ],
)
def test_the_newest_version_counts(tmp_path: Path, older: str, newer: str) -> None:
    write(tmp_path, f"gemm/vllm/{older}/gemm_perf", [{**GEMM, "m": 3}, GEMM])
    samples = only(read(tmp_path, place=f"gemm/vllm/{newer}/gemm_perf"))
    assert samples.source.endswith(f"gemm, vllm {newer}")
    assert shape(samples)["m"] == [1.0]


def test_a_supplement_does_not_replace_an_older_campaign(tmp_path: Path) -> None:
    write(tmp_path, "moe/vllm/0.19.0/moe_perf", [{**MOE, "num_tokens": tokens} for tokens in (1, 2, 3)])
    samples = only(read(tmp_path, [{**MOE, "num_tokens": 99}], place="moe/vllm/0.24.0/moe_perf"))
    assert shape(samples)["num_tokens"] == [1.0, 2.0, 3.0]
    assert samples.source.endswith("moe, vllm 0.19.0")


def test_versions_of_all_tables_are_named(tmp_path: Path) -> None:
    write(tmp_path, "moe/vllm/0.19.0/moe_perf", [MOE])
    assert read(tmp_path).kernels == "vllm 0.24.0, vllm 0.19.0"


def products(time: float, dtype: str, count: int = 40) -> list[Row]:
    return [{**GEMM, "gemm_dtype": dtype, "m": m, "latency": time * (1.0 + m / count)} for m in range(count)]


def test_a_number_format_that_waits_for_the_host_is_left_out(tmp_path: Path) -> None:
    rows = [*products(0.003, "bfloat16"), *products(0.019, "fp8"), *products(0.057, "fp8_block")]
    assert names(read(tmp_path, rows)) == ["gemm.bf16", "gemm.fp8"]


def test_nothing_is_left_out_without_a_16_bit_table_to_compare_to(tmp_path: Path) -> None:
    rows = [*products(0.003, "fp8"), *products(0.057, "fp8_block")]
    assert names(read(tmp_path, rows)) == ["gemm.fp8", "gemm.fp8_block"]


PREFILL = "attention/vllm/0.24.0/context_attention_perf"
DECODE = "attention/vllm/0.24.0/generation_attention_perf"


def test_prefill_reads_whole_prompts_without_a_window(tmp_path: Path) -> None:
    rows = [ATTENTION, {**ATTENTION, "isl": 32, "window_size": 128}, {**ATTENTION, "isl": 64, "step": 16}]
    assert shape(only(read(tmp_path, rows, PREFILL))) == {
        "batch_size": [2.0],
        "sequence_length": [16.0],
        "num_heads": [8.0],
        "num_kv_heads": [4.0],
        "head_dim": [128.0],
    }


def test_no_kv_heads_mean_one_for_each_head(tmp_path: Path) -> None:
    rows = [{**ATTENTION, "num_key_value_heads": 0}]
    assert shape(only(read(tmp_path, rows, PREFILL)))["num_kv_heads"] == [8.0]


def test_a_decode_step_sees_its_past_and_itself(tmp_path: Path) -> None:
    rows = [{**ATTENTION, "isl": 1, "step": 4095}]
    assert shape(only(read(tmp_path, rows, DECODE)))["context_length"] == [4096.0]


def test_tables_without_windows_and_kernels_are_read_whole(tmp_path: Path) -> None:
    row = {name: value for name, value in ATTENTION.items() if name not in ("window_size", "kernel_source")}
    samples = only(read(tmp_path, [row, {**row, "latency": 1.5}], PREFILL))
    assert samples.seconds.tolist() == [1e-3]


def test_attention_is_told_apart_by_the_formats_of_its_products_and_its_cache(tmp_path: Path) -> None:
    formats = {
        ("bfloat16", "bfloat16"): 1.0,
        ("float16", "float16"): 3.0,
        ("bfloat16", "fp8"): 4.0,
        ("fp8", "fp8"): 5.0,
    }
    rows = [
        {**ATTENTION, "attn_dtype": dtype, "kv_cache_dtype": cache, "latency": time}
        for (dtype, cache), time in formats.items()
    ]
    measurements = read(tmp_path, rows, PREFILL)
    times = {samples.precision: samples.seconds.tolist() for samples in measurements.operators}
    assert times == {"bf16": [2e-3], "fp8_kv": [4e-3], "fp8": [5e-3]}


@pytest.mark.parametrize(("row", "place"), [(ATTENTION, PREFILL), (MOE, "moe/vllm/0.24.0/moe_perf")])
def test_the_quickest_kernel_of_a_shape_counts_by_its_own_median(
    tmp_path: Path, row: Row, place: str
) -> None:
    times = (("slow", 0.1), ("slow", 7.0), ("slow", 8.0), ("quick", 3.0), ("quick", 5.0))
    rows = [{**row, "kernel_source": kernel, "latency": time} for kernel, time in times]
    assert only(read(tmp_path, rows, place)).seconds.tolist() == [4e-3]


def test_heads_of_mla_are_those_of_a_rank_as_they_stand(tmp_path: Path) -> None:
    rows = [MLA, {**MLA, "tp_size": 4, "latency": 1.5}]
    samples = only(read(tmp_path, rows, "mla/vllm/0.24.0/generation_mla_perf"))
    assert shape(samples) == {"batch_size": [2.0], "context_length": [4096.0], "num_heads": [16.0]}
    assert samples.seconds.tolist() == [1e-3]


def test_tables_of_mla_modules_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "mla/vllm/0.24.0/mla_generation_module_perf", [MLA])
    assert names(read(tmp_path)) == ["gemm.bf16"]


def test_skew_is_the_exponent_of_the_routing(tmp_path: Path) -> None:
    distributions = ("balanced", "power_law_1.01", "power_law_1.2", "measured_in_production")
    rows = [{**MOE, "distribution": name, "latency": 1.0 + i} for i, name in enumerate(distributions)]
    samples = only(read(tmp_path, rows, "moe/vllm/0.24.0/moe_perf"))
    assert shape(samples) == {
        "num_tokens": [7.0] * 3,
        "hidden_size": [2048.0] * 3,
        "moe_ffn_hidden_size": [768.0] * 3,
        "top_k": [8.0] * 3,
        "num_experts": [128.0] * 3,
        "tp": [2.0] * 3,
        "ep": [4.0] * 3,
        "skew": [0.0, 1.01, 1.2],
    }
    assert samples.seconds.tolist() == [1e-3, 2e-3, 3e-3]


def test_formats_of_experts_keep_their_names(tmp_path: Path) -> None:
    types = ("bfloat16", "fp8", "fp8_block", "nvfp4", "int4_wo", "w4a8_mxfp4_mxfp8", "W4AFP8")
    rows = [{**MOE, "moe_dtype": name} for name in types]
    measurements = read(tmp_path, rows, "moe/vllm/0.24.0/moe_perf")
    formats = {samples.precision for samples in measurements.operators}
    assert formats == {"bf16", "fp8", "fp8_block", "nvfp4", "int4_wo", "w4a8_mxfp4_mxfp8", "w4afp8"}


def test_collectives_count_bytes_of_the_whole_buffer_by_operation_and_ranks(tmp_path: Path) -> None:
    rows = [
        NCCL,
        {**NCCL, "message_size": 256, "latency": 0.01},
        {**NCCL, "message_size": 256, "latency": 0.03},
        {**NCCL, "op_name": "alltoall", "num_gpus": 4},
        {**NCCL, "op_name": "broadcast"},
        {**NCCL, "nccl_dtype": "int8", "latency": 0.07},
    ]
    write(tmp_path, "comm/nccl/2.29.2/nccl_perf", rows)
    reduce, exchange = read(tmp_path).collectives
    assert (reduce.collective, reduce.ranks) == ("all_reduce", 8)
    assert reduce.num_bytes.tolist() == [512.0, 1024.0]
    assert reduce.seconds.tolist() == [2e-5, 2e-5]
    assert reduce.source == "aiconfigurator-core (Apache-2.0): nccl 2.29.2"
    assert (exchange.collective, exchange.ranks) == ("all_to_all", 4)


def test_bytes_are_elements_where_there_is_no_wider_type(tmp_path: Path) -> None:
    write(tmp_path, "comm/nccl/2.29.2/nccl_perf", [{**NCCL, "nccl_dtype": "int8"}])
    (curve,) = read(tmp_path).collectives
    assert curve.num_bytes.tolist() == [512.0]


def test_the_newest_nccl_counts_however_short_its_table(tmp_path: Path) -> None:
    long = [{**NCCL, "message_size": size} for size in (256, 512, 1024)]
    write(tmp_path, "comm/nccl/2.27/nccl_perf", long)
    write(tmp_path, "comm/nccl/2.29.2/nccl_perf", [NCCL])
    (curve,) = read(tmp_path).collectives
    assert curve.num_bytes.tolist() == [1024.0]


@pytest.mark.parametrize(
    ("system", "engine", "message"),
    [
        ("h200_smx", "vllm", "unknown system 'h200_smx'; did you mean 'h200_sxm'?; known: a100_sxm, "),
        ("b60", "vllm", "system 'b60': there is no spec of this GPU; known: a100_sxm, "),
        ("a30", "vllm", "system 'a30': there is no spec of this GPU"),
        ("h200_sxm", "vlm", "unknown engine 'vlm'; did you mean 'vllm'?; known: vllm, sglang, trtllm"),
        ("h200_sxm", "sglang", "no operator tables of sglang; there are those of: vllm"),
        ("l4", "vllm", "no operator tables of vllm; there are those of: none"),
    ],
)
def test_unknown_names_and_missing_tables_say_what_there_is(
    tmp_path: Path, system: str, engine: str, message: str
) -> None:
    write(tmp_path, "gemm/vllm/0.24.0/gemm_perf", [GEMM])
    with pytest.raises(SpecError) as caught:
        read_aiconfigurator(system, engine, root=tmp_path)
    assert message in str(caught.value)


def test_a_table_without_its_columns_is_refused_by_name(tmp_path: Path) -> None:
    row = {name: value for name, value in GEMM.items() if name not in ("k", "latency")}
    with pytest.raises(
        SpecError, match=r"gemm_perf\.parquet: not such a table: column\(s\) k, latency are missing"
    ):
        read(tmp_path, [row])


def test_a_file_that_is_no_parquet_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "gemm/vllm/0.24.0/gemm_perf", [GEMM]).write_bytes(
        b"version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(
        SpecError, match=r"gemm_perf\.parquet: is not a parquet table .* install aiconfigurator-core"
    ):
        read_aiconfigurator("h200_sxm", "vllm", root=tmp_path)


@pytest.mark.parametrize(
    ("absent", "root"), [("pandas", Path()), ("pyarrow", Path()), ("aiconfigurator_core", None)]
)
def test_a_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, absent: str, root: Path | None
) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(CalibrationError, match=r"pip install 'meshwright\[aiconfigurator\]'"):
        read_aiconfigurator("h200_sxm", "vllm", root=root)


def test_every_system_is_a_gpu_of_ours() -> None:
    assert [load_gpu(gpu).id for gpu in SYSTEMS.values()] == list(SYSTEMS.values())


@needs_package
def test_the_package_holds_the_known_products_of_h200() -> None:
    measurements = read_aiconfigurator("h200_sxm", "vllm")
    samples = only(measurements, "gemm.bf16")
    assert len(samples.seconds) == 35742
    m, n, k = (samples.shape[field] for field in ("m", "n", "k"))
    assert samples.seconds[(m == 32768) & (n == 65536) & (k == 12288)] == pytest.approx([0.063831], rel=1e-4)
    assert "gemm.fp8_block" not in names(measurements)


@needs_package
def test_the_packages_collectives_do_not_outrun_the_links() -> None:
    # Bus bandwidth (nccl-tests) of H200's NVLink 4, 450 GB/s per direction; NVLink SHARP adds in the switch, which
    # lets all-reduces seem a little quicker. Bytes of a rank's part, or of elements, would be off by 2 or 8.
    for curve in read_aiconfigurator("h200_sxm", "vllm").collectives:
        factor = (2.0 if curve.collective == "all_reduce" else 1.0) * (curve.ranks - 1) / curve.ranks
        busiest = float((factor * curve.num_bytes / curve.seconds).max())
        assert 200e9 < busiest < 1.1 * 450e9, (curve.collective, curve.ranks)


@needs_package
@pytest.mark.parametrize("engine", ENGINES)
def test_the_packages_tables_of_every_system_are_whole(engine: str) -> None:
    for system in ("a100_sxm", "b200_sxm"):
        measurements = read_aiconfigurator(system, engine)
        assert {"gemm.bf16", "attention_prefill.bf16", "attention_decode.bf16", "moe.bf16"} <= set(
            names(measurements)
        )
        for samples in measurements.operators:
            columns = pd.DataFrame(dict(samples.shape))
            assert np.isfinite(columns.to_numpy()).all()
            assert not columns.duplicated().any()
            assert np.isfinite(samples.seconds).all()
            assert (samples.seconds > 0.0).all()
