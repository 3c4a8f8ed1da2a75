"""What the suites would measure: on this CPU, and on GPUs that are only described; nothing is allocated."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="suites need torch, an optional extra")
pytest.importorskip("scipy", reason="Sobol sequences are scipy's")

from meshwright.costmodels.operators import OPERATORS  # noqa: E402 - after the skips
from meshwright.errors import SpecError  # noqa: E402
from meshwright.profiler.device import Device  # noqa: E402
from meshwright.profiler.settings import ProfileSettings, quick_settings  # noqa: E402
from meshwright.profiler.suites import SUITES, load_suite  # noqa: E402
from meshwright.profiler.suites.base import Case  # noqa: E402
from meshwright.profiler.suites.collective_ranks import plan_jobs  # noqa: E402
from meshwright.profiler.suites.operands import half_precision, lacks, main_precision  # noqa: E402
from meshwright.simcore.domain.model_catalog import load_model  # noqa: E402

H200 = Device(
    type="cuda",
    name="NVIDIA H200",
    gpu="h200-sxm-141",
    num_devices=8,
    num_sms=132,
    memory_bytes=150e9,
    l2_bytes=5e7,
    software={"compute_capability": "9.0"},
)
A100 = replace(H200, gpu="a100-sxm-80", memory_bytes=85e9, software={"compute_capability": "8.0"})
V100 = replace(H200, gpu="v100-sxm2-32", memory_bytes=34e9, software={"compute_capability": "7.0"})
MI300X = replace(
    H200,
    type="rocm",
    gpu="mi300x",
    memory_bytes=206e9,
    software={"architecture": "gfx942:sramecc+:xnack-"},
)
UNKNOWN = replace(H200, gpu=None, num_devices=1)
CPU = Device(
    type="cpu", name="host", gpu="cpu-host", num_devices=1, num_sms=1, memory_bytes=1e10, l2_bytes=3e7
)
DEVICES = {"h200": H200, "a100": A100, "v100": V100, "mi300x": MI300X, "unknown": UNKNOWN, "cpu": CPU}


def cases_of(device: Device, settings: ProfileSettings) -> list[Case]:
    return [case for name in SUITES for case in load_suite(name).cases(device, settings)]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
@pytest.mark.parametrize("settings", [ProfileSettings(), quick_settings()], ids=["default", "quick"])
def test_cases_have_the_fields_of_their_operator(device: Device, settings: ProfileSettings) -> None:
    for case in cases_of(device, settings):
        if case.operator in OPERATORS:
            assert tuple(case.shape) == OPERATORS[case.operator].fields
            assert all(isinstance(value, int | float) and value >= 0 for value in case.shape.values())
        else:
            assert case.value is not None or case.suite in ("collectives", "layer")


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_cases_are_the_same_each_time(device: Device) -> None:
    def described() -> list[tuple[str, str, object]]:
        return [(case.operator, case.precision, dict(case.shape)) for case in cases_of(device, settings)]

    settings = quick_settings()
    assert described() == described()


def test_every_suite_is_named_as_it_is_listed() -> None:
    for name in SUITES:
        assert load_suite(name).name == name
        assert {case.suite for case in load_suite(name).cases(CPU, quick_settings())} == {name}
    with pytest.raises(SpecError, match=r"unknown suite 'gem'; did you mean 'gemm'\?"):
        load_suite("gem")


def test_a_hopper_gpu_gets_the_points_the_budget_was_made_for() -> None:
    counts = Counter((case.operator, case.precision) for case in cases_of(H200, ProfileSettings()))
    assert counts["gemm", "bf16"] == counts["gemm", "fp8"] == 300
    assert counts["gemm_dgrad", "bf16"] == counts["gemm_wgrad", "bf16"] == 100
    for precision in ("fp8", "fp16", "fp32", "tf32"):
        assert counts["gemm_dgrad", precision] == counts["gemm_wgrad", precision] == 16
    assert counts["gemm", "fp32"] == counts["gemm", "tf32"] == counts["gemm", "fp16"] == 100
    assert counts["attention_prefill", "bf16"] == counts["attention_decode", "bf16"] == 300
    assert counts["attention_backward", "bf16"] == counts["moe", "bf16"] == 150
    assert counts["rms_norm", "bf16"] == counts["adam_fused", "fp32"] == 8
    assert counts["peer_to_peer", "bf16"] == counts["host_to_device", "bf16"] == 12


@pytest.mark.parametrize(
    ("device", "name"), [(H200, "software.all.host_launch_latency"), (CPU, "launch.dispatch")]
)
def test_the_host_time_of_a_launch_is_a_constant_where_kernels_run_beside_the_host(
    device: Device, name: str
) -> None:
    names = {case.shape.get("name") for case in cases_of(device, quick_settings())}
    assert names & {"software.all.host_launch_latency", "launch.dispatch"} == {name}


def test_a_lone_gpu_has_no_peer() -> None:
    operators = {case.operator for case in cases_of(UNKNOWN, quick_settings())}
    names = {case.shape.get("name") for case in cases_of(UNKNOWN, quick_settings())}
    assert "peer_to_peer" not in operators
    assert "software.all.fsdp_contention" not in names
    assert "software.all.fsdp_contention" in {
        case.shape.get("name") for case in cases_of(H200, quick_settings())
    }


@pytest.mark.parametrize(
    ("device", "missing"),
    [
        (H200, set()),
        (A100, {"fp8"}),
        (V100, {"bf16", "fp8", "tf32"}),
        (MI300X, {"tf32"}),
        (CPU, {"fp8", "tf32"}),
    ],
    ids=["h200", "a100", "v100", "mi300x", "cpu"],
)
def test_formats_a_device_lacks_become_one_row_a_layout_with_a_reason(
    device: Device, missing: set[str]
) -> None:
    products = list(load_suite("gemm").cases(device, ProfileSettings()))
    layouts, precisions = ("gemm", "gemm_dgrad", "gemm_wgrad"), ("bf16", "fp8", "fp16", "fp32", "tf32")
    for operator, precision in itertools.product(layouts, precisions):
        rows = [case for case in products if (case.operator, case.precision) == (operator, precision)]
        assert (lacks(device, precision) is not None) == (precision in missing)
        assert (len(rows) == 1) == (precision in missing)
        if precision in missing:
            with pytest.raises(NotImplementedError, match=precision):
                rows[0].prepare()


def test_fp8_gradients_have_the_sizes_their_units_take() -> None:
    for case in load_suite("gemm").cases(H200, ProfileSettings()):
        if case.precision == "fp8":
            assert case.shape["n"] % 16 == case.shape["k"] % 16 == 0


def test_a_volta_gpu_is_measured_in_fp16_throughout() -> None:
    assert half_precision(V100) == "fp16"
    assert main_precision(V100, ProfileSettings()) == "fp16"
    assert main_precision(H200, ProfileSettings(precisions=("fp32",))) == "fp32"
    assert main_precision(H200, ProfileSettings(precisions=("fp8",))) == "bf16"
    # Who asks for bf16, as quick settings do, means the 16 bits the device has.
    counts = Counter((case.operator, case.precision) for case in cases_of(V100, quick_settings()))
    assert counts["gemm", "fp16"] == 100
    assert counts["gemm_wgrad", "fp16"] == counts["gemm_dgrad", "fp16"] == 33
    names = [case.shape.get("name") for case in load_suite("sustained").cases(V100, quick_settings())]
    assert names[0] == "sustained_clock.bf16"  # the name that calibrations know
    wide = ProfileSettings(precisions=("fp32",))
    assert list(load_suite("sustained").cases(V100, wide)) == []


def test_the_exact_shapes_of_a_model_are_added() -> None:
    model = load_model("llama-3-70b")
    plain = {str(case.shape) + case.operator for case in cases_of(H200, ProfileSettings())}
    cases = [
        case
        for case in cases_of(H200, ProfileSettings(model=model))
        if str(case.shape) + case.operator not in plain
    ]
    counts = Counter(case.operator for case in cases)
    widths = {
        (case.shape["n"], case.shape["k"])
        for case in cases
        if case.operator == "gemm" and case.precision == "bf16"
    }
    # 64 + 2 x 8 heads of 128 over tp 1 and 8; gates and up of 28672; the LM head.
    assert {(10240, 8192), (1280, 8192), (57344, 8192), (7168, 8192), (8192, 3584), (128256, 8192)} <= widths
    assert counts["attention_prefill"] > 0
    assert counts["attention_decode"] > 0
    assert counts["moe"] == 0
    gradients = [case for case in cases if case.operator == "gemm_wgrad"]
    assert {case.shape["k"] for case in gradients} <= {1024, 4096, 32768}
    # The forward product of m tokens, n outputs and k inputs has this weight gradient.
    assert {"m": 10240, "n": 8192, "k": 4096} in [dict(case.shape) for case in gradients]


def test_a_model_of_experts_with_latent_attention_adds_its_own() -> None:
    settings = ProfileSettings(model=load_model("deepseek-v3"), points={})
    counts = Counter(case.operator for case in cases_of(H200, settings))
    assert counts["moe"] > 0
    assert counts["mla_prefill"] > 0
    assert counts["mla_decode"] > 0
    assert counts["attention_prefill"] == 0
    experts = [dict(case.shape) for case in cases_of(H200, settings) if case.operator == "moe"]
    assert {(each["hidden_size"], each["moe_ffn_hidden_size"], each["top_k"]) for each in experts} == {
        (7168, 2048, 8)
    }


def test_a_cpu_does_not_wait_for_the_shapes_of_a_large_model() -> None:
    model = load_model("llama-3-70b")
    for case in load_suite("gemm").cases(CPU, ProfileSettings(model=model)):
        assert 2.0 * float(case.shape["m"]) * float(case.shape["n"]) * float(case.shape["k"]) <= 1e8


def test_what_autograd_or_the_host_steers_is_not_captured() -> None:
    cases = cases_of(H200, quick_settings())
    by_operator = {case.operator: case.is_capturable for case in cases}
    for operator in (
        "attention_backward",
        "adam_unfused",
        "host_to_device",
        "device_to_host",
        "peer_to_peer",
    ):
        assert not by_operator[operator]
    for operator in ("gemm", "attention_decode", "rms_norm", "adam_fused", "copy"):
        assert by_operator[operator]


def test_groups_are_those_a_plan_can_ask_for() -> None:
    jobs = plan_jobs(["a"] * 8, 2.0**30)
    assert {(len(job.ranks), job.num_nodes) for job in jobs} == {(2, 1), (4, 1), (8, 1)}
    assert {job.num_bytes for job in jobs} == {4**exponent * 1024 for exponent in range(11)}
    assert {len(job.ranks) for job in jobs if job.collective == "send"} == {2}
    assert all(job.ranks[0] == 0 for job in jobs)
    assert all(job.num_bytes % (4 * len(job.ranks)) == 0 for job in plan_jobs(["a"] * 6, 1e6))
    assert plan_jobs(["a"], 1e6) == ()
    assert pickle.loads(pickle.dumps(jobs)) == jobs


def test_groups_across_nodes_are_operators_of_their_own() -> None:
    jobs = plan_jobs(["a", "a", "b", "b", "c", "c"], 1024)
    assert {(job.ranks, job.num_nodes) for job in jobs} == {
        ((0, 1), 1),
        ((0, 2), 2),
        ((0, 2, 4), 3),
        ((0, 1, 2, 3, 4, 5), 3),
    }
    sends = [job.ranks for job in jobs if job.collective == "send"]
    assert sends == [(0, 1), (0, 2)]
