"""Every suite for real on this CPU, in small: what it prepares runs, and gives a time for every operator."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

torch = pytest.importorskip("torch", reason="suites need torch, an optional extra")
pytest.importorskip("scipy", reason="Sobol sequences are scipy's")

from meshwright.costmodels.operators import OPERATORS  # noqa: E402 - after the skips
from meshwright.profiler.device import Device, discover_device  # noqa: E402
from meshwright.profiler.failures import Failure  # noqa: E402
from meshwright.profiler.profile import run_profile  # noqa: E402
from meshwright.profiler.protocol import Timing  # noqa: E402
from meshwright.profiler.settings import ProfileSettings  # noqa: E402
from meshwright.profiler.store import read_measurements  # noqa: E402
from meshwright.profiler.suites import collectives, gemm, grouped_gemm, layer, load_suite  # noqa: E402
from meshwright.profiler.suites.base import Case  # noqa: E402

TINY = ProfileSettings(
    points=dict.fromkeys(ProfileSettings().points, 2),
    num_passes=1,
    warm_up=1,
    min_repeats=3,
    kernel_seconds=1e-6,
    sustained_seconds=0.05,
    sentinel_interval=1e9,
)
# What two GPUs, or one, would have to be there for.
ABSENT = {"host_to_device", "device_to_host", "peer_to_peer"}


@pytest.fixture(scope="module")
def cpu() -> Device:
    return discover_device("cpu")


def test_a_profile_of_all_suites_measures_every_operator(tmp_path: Path, cpu: Device) -> None:
    summary = run_profile(tmp_path / "host.jsonl", cpu, TINY)
    assert summary.missing == {}
    # fp8 and tf32 products in three layouts, and graphs.
    assert {status: count for status, count in summary.counts.items() if status != "ok"} == {"unsupported": 7}
    measured = read_measurements([tmp_path / "host.jsonl"])
    assert {samples.operator for samples in measured.operators} == set(OPERATORS) - ABSENT
    for samples in measured.operators:
        assert tuple(samples.shape) == OPERATORS[samples.operator].fields
        assert (samples.seconds > 0.0).all()
    assert 0.3 < measured.constants["sustained_clock.bf16"].value < 3.0
    assert 1e-7 < measured.constants["launch.kernel"].value < 1e-3
    assert 1e-7 < measured.constants["launch.dispatch"].value < 1e-3
    # Layers in the format of the other suites, so that the report can compare them.
    assert {(each.step, each.precision) for each in measured.layers} == {
        ("forward", "bf16"),
        ("backward", "bf16"),
        ("decode", "bf16"),
        ("optimizer", "fp32"),
    }
    assert measured.constants["contention.copy"].value > 0.2
    assert 0.01 < measured.constants["memory_stream.efficiency"].value < 10.0


def test_collectives_run_between_two_processes(cpu: Device) -> None:
    results = list(collectives.run_collectives(cpu, ProfileSettings(max_collective_bytes=4096.0)))
    names = {case.operator for case, _ in results}
    assert names == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"}
    assert {tuple(sorted(case.shape.items())) for case, _ in results} == {
        (("num_bytes", 1024), ("ranks", 2)),
        (("num_bytes", 4096), ("ranks", 2)),
    }
    for case, result in results:
        assert isinstance(result, Timing), f"{case.label}: {result}"
        assert 1e-6 < result.seconds < 5.0


def test_a_process_that_ends_leaves_a_row_with_a_reason(monkeypatch: pytest.MonkeyPatch, cpu: Device) -> None:
    class Silent:
        def poll(self, timeout: float) -> bool:
            return True

        def recv(self) -> object:
            raise EOFError

    class Quiet:
        def close(self) -> None:
            pass

    class Context:
        def Pipe(self, *, duplex: bool) -> tuple[Silent, Quiet]:
            return Silent(), Quiet()

        def Process(self, **arguments: object) -> Process:
            return Process()

    class Process:
        def start(self) -> None:
            pass

        terminate = join = start

    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: Context())
    results = list(collectives.run_collectives(cpu, ProfileSettings(max_collective_bytes=1024.0)))
    assert [(case.operator, result) for case, result in results] == [
        ("all_reduce", Failure(status="failed", reason="a process of the group has ended"))
    ]


@pytest.mark.parametrize(
    ("operator", "left", "right"),
    [
        ("gemm", ((3, 5), (5, 1)), ((5, 7), (1, 5))),  # the weight lies (n, k)
        ("gemm_dgrad", ((3, 5), (5, 1)), ((5, 7), (7, 1))),
        ("gemm_wgrad", ((3, 5), (1, 3)), ((5, 7), (7, 1))),  # the output gradient lies (k, m)
    ],
)
def test_products_have_the_layout_of_their_layer(
    operator: str,
    left: tuple[tuple[int, ...], tuple[int, ...]],
    right: tuple[tuple[int, ...], tuple[int, ...]],
    cpu: Device,
) -> None:
    product = gemm.prepare_product(operator, "fp32", {"m": 3, "n": 7, "k": 5}, cpu)
    assert isinstance(product, partial)
    a, b, out = product.args
    assert (tuple(a.shape), a.stride()) == left
    assert (tuple(b.shape), b.stride()) == right
    product()
    torch.testing.assert_close(out, a @ b)


@pytest.mark.parametrize("operator", ["gemm", "gemm_dgrad", "gemm_wgrad"])
def test_fp8_operands_lie_along_the_inner_size(operator: str, cpu: Device) -> None:
    # A processor computes such products slowly, which is enough to see that they are right.
    product = gemm.prepare_product(operator, "fp8", {"m": 32, "n": 48, "k": 16}, cpu)
    assert isinstance(product, partial)
    a, b = product.args
    assert (a.stride(), b.stride()) == ((16, 1), (1, 16))
    out = product()
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.float(), a.float() @ b.float(), rtol=0.01, atol=0.05)


def test_gradients_in_fp8_are_summed_at_full_width() -> None:
    described = cast("Device", SimpleNamespace(type="cuda", torch_name="cpu", software={}))
    shape = {"m": 16, "n": 16, "k": 16}
    products = [gemm.prepare_product(operator, "fp8", shape, described) for operator in gemm._LAYOUTS]
    assert [cast("partial[object]", each).keywords["use_fast_accum"] for each in products] == [
        True,
        False,
        False,
    ]


def test_a_tf32_product_leaves_the_precision_of_others_alone(cpu: Device) -> None:
    before = torch.get_float32_matmul_precision()
    gemm.prepare_product("gemm", "tf32", {"m": 3, "n": 7, "k": 5}, cpu)()
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("ep", [1, 4])
@pytest.mark.parametrize("skew", [0.0, 1.2])
def test_grouped_kernels_and_experts_in_turn_agree(ep: int, skew: float, cpu: Device) -> None:
    shape = {
        "num_tokens": 13,
        "hidden_size": 16,
        "moe_ffn_hidden_size": 32,
        "top_k": 2,
        "num_experts": 8,
        "tp": 2,
        "ep": ep,
        "skew": skew,
    }
    function = grouped_gemm._prepare(shape, "fp32", cpu, 0)
    assert isinstance(function, partial)
    x, sizes = function.args
    experts = function.func.__self__
    # All rows on one rank, or those of the rank with the most.
    assert sum(sizes) == 26 if ep == 1 else sum(sizes) >= 26 / 4
    torch.testing.assert_close(experts.fused(x), experts.one_by_one(x, sizes))


def test_the_layer_has_the_parameters_it_says(cpu: Device) -> None:
    shape = layer.LayerShape(
        hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=8, sequence_length=8
    )
    built = layer.Layer(shape)
    assert sum(parameter.numel() for parameter in built.parameters()) == shape.num_parameters


def test_a_decode_step_continues_what_the_whole_sequence_computes() -> None:
    shape = layer.LayerShape(hidden_size=32, ffn_hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=8)
    built, length = layer.Layer(shape), 6
    x = torch.randn(2, length, 32)
    cosine, sine = torch.randn(length, 1, 8), torch.randn(length, 1, 8)
    with torch.no_grad():
        whole = built(x, cosine, sine)
        projected = built.query_key_value(built.attention_norm(x)).view(2, length, -1, 8)
        _, key, value = projected.split((4, 2, 2), dim=2)
        keys = layer._rotated(key, cosine, sine).transpose(1, 2).contiguous()
        values = value.transpose(1, 2).contiguous()
        keys[:, :, -1:] = 0.0  # the step itself writes its own
        values[:, :, -1:] = 0.0
        last = built(x[:, -1:], cosine[-1:], sine[-1:], (keys, values))
    torch.testing.assert_close(last, whole[:, -1:])


def cases(suite: str, operator: str, cpu: Device) -> list[Case]:
    return [case for case in load_suite(suite).cases(cpu, TINY) if case.operator == operator]


def output(function: Callable[[], object]) -> torch.Tensor:
    result = function()
    assert isinstance(result, torch.Tensor)
    return result


def test_decode_attends_to_the_whole_cache_with_every_head(cpu: Device) -> None:
    for case in cases("attention", "attention_decode", cpu):
        out = output(case.prepare())
        assert out.shape[0] == case.shape["batch_size"]
        assert out.shape[1] * out.shape[2] == case.shape["num_heads"]
        assert out.shape[1] == case.shape["num_kv_heads"]
        assert out.shape[3] == case.shape["head_dim"]


def test_latent_decode_returns_the_width_of_the_latent(cpu: Device) -> None:
    for case in cases("attention", "mla_decode", cpu):
        assert output(case.prepare()).shape[1:] == (1, case.shape["num_heads"], 512)


def test_streaming_kernels_read_and_write_the_bytes_they_say(cpu: Device) -> None:
    for case in cases("elementwise", "softmax", cpu):
        assert 2 * output(case.prepare()).nbytes == case.shape["num_bytes"]
    for case in cases("copies", "copy", cpu):
        # Within the half a byte that an odd size loses.
        assert abs(2 * output(case.prepare()).nbytes - float(case.shape["num_bytes"])) <= 1
    for case in cases("elementwise", "embedding", cpu):
        out = output(case.prepare())
        assert 2 * out.nbytes + 8 * out.shape[0] == case.shape["num_bytes"]


def test_closing_early_ends_the_processes(monkeypatch: pytest.MonkeyPatch, cpu: Device) -> None:
    ended = []

    class Process:
        def start(self) -> None:
            pass

        def terminate(self) -> None:
            ended.append(self)

        def join(self) -> None:
            pass

    class Receiver:
        def poll(self, timeout: float) -> bool:
            return True

        def recv(self) -> object:
            return Failure(status="failed", reason="made up")

    class Context:
        def Pipe(self, *, duplex: bool) -> tuple[Receiver, contextlib.ExitStack]:
            return Receiver(), contextlib.ExitStack()

        def Process(self, **arguments: object) -> Process:
            return Process()

    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: Context())
    results = collectives.run_collectives(cpu, TINY)
    next(iter(results))
    results.close()  # type: ignore[attr-defined]  # a generator
    assert len(ended) == 2
