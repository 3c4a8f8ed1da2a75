"""Every Triton kernel against torch in fp64: on a GPU where there is one, and in Triton's interpreter.

Triton decides when it is imported whether to interpret, so the interpreter runs in a child process: this very
file as a script, which prints the worst error of each case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")
pytest.importorskip("triton", reason="the kernels under test are Triton's")

from meshwright.kernels import (  # noqa: E402 - after the skips
    contention,
    gather,
    grouped_gemm,
    launch,
    permute,
    rms_norm,
    streaming,
)

MODULES = (contention, gather, grouped_gemm, launch, permute, rms_norm, streaming)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP32_ROUNDING = 2.0**-24


class Draw:
    """Random tensors of one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.numpy = np.random.default_rng(20240607)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(self.numpy.standard_normal(shape)).to(dtype).to(self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.numpy.integers(0, high, shape)).to(self.device)

    def distinct(self, high: int, num_rows: int, num_columns: int) -> torch.Tensor:
        rows = [self.numpy.permutation(high)[:num_columns].tolist() for _ in range(num_rows)]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(num_rows, num_columns)


def error(
    out: torch.Tensor,
    exact: torch.Tensor,
    num_roundings: int = 0,
    magnitude: torch.Tensor | None = None,
) -> float:
    """Return the largest error, over what one rounding of the result and some of fp32 explain."""
    assert out.shape == exact.shape
    assert exact.dtype == torch.float64
    kind = torch.finfo(out.dtype)
    allowed = kind.eps / 2 * exact.abs() + kind.tiny
    # Twice, because tensor cores cut a sum's last bit off where others round it.
    allowed += 2 * num_roundings * FP32_ROUNDING * (exact.abs() if magnitude is None else magnitude)
    # Infinity for NaN, which max() of Python would lose.
    ratio = ((out.double() - exact).abs() / allowed).nan_to_num(nan=torch.inf)
    return float(ratio.max()) if out.numel() else 0.0


def stream_copy(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for shape in ((0,), (1,), (3, 5, 7), (4096,), (20_001,)):
            x = draw.normal(*shape, dtype=dtype)
            out = torch.full_like(x, torch.nan)
            streaming.stream_copy(out, x)
            worst = max(worst, 0.0 if torch.equal(out, x) else torch.inf)
    return worst


def stream_triad(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for size, scale in ((0, 1), (1, 2.5), (1000, -0.3), (8192, 0.0), (20_001, 1)):
            a, b = draw.normal(size, dtype=dtype), draw.normal(size, dtype=dtype)
            out = torch.full_like(a, torch.nan)
            streaming.stream_triad(out, a, b, scale)
            product = scale * b.double()
            # The scale, the product and the sum are each rounded to fp32.
            worst = max(worst, error(out, a.double() + product, 3, a.double().abs() + product.abs()))
    return worst


def gather_rows(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for (num_rows, width), num_out in (((1, 1), 5), ((50, 33), 77), ((7, 4100), 3), ((9, 64), 0)):
            x, indices = draw.normal(num_rows, width, dtype=dtype), draw.integers(num_rows, num_out)
            for kind in (torch.int32, torch.int64):
                out = gather.gather_rows(x, indices.to(kind))
                worst = max(worst, error(out, x.double()[indices]))
    return worst


def gather_rows_outside_the_table(draw: Draw) -> float:
    x = draw.normal(4, 3)
    out = gather.gather_rows(x, torch.tensor([-1, 2, 4, 2**40], device=draw.device))
    exact = torch.zeros(4, 3, dtype=torch.float64, device=draw.device)
    exact[1] = x[2].double()
    return error(out, exact)


def strided_gather(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for (num_rows, width), stride in (
            ((1, 1), 1),
            ((50, 33), 3),
            ((7, 4100), 2),
            ((9, 64), 100),
            ((0, 8), 1),
        ):
            x = draw.normal(num_rows, width, dtype=dtype)
            worst = max(worst, error(gather.strided_gather(x, stride), x.double()[::stride]))
    return worst


def empty_launch(draw: Draw) -> float:
    x = draw.normal(17)
    before = x.double()
    launch.empty_launch(x)
    return error(x, before)


def _grouped_gemm(draw: Draw, dtype: torch.dtype) -> float:
    worst = 0.0
    for sizes, k, n in (
        ([3], 1, 1),
        ([0, 5, 0, 1, 17, 0], 100, 70),
        ([0, 0, 0], 64, 32),
        ([64, 64], 128, 130),
        ([0, 200, 1], 64, 65),
        ([129, 63, 0], 72, 130),
        ([200, 0], 128, 128),
    ):
        x = draw.normal(sum(sizes), k, dtype=dtype)
        weights = draw.normal(len(sizes), n, k, dtype=dtype).transpose(1, 2)
        group_sizes = torch.tensor(sizes, device=draw.device)
        exact = torch.cat(
            [x.new_zeros(0, n).double()]
            + [rows.double() @ weight.double() for rows, weight in zip(x.split(sizes), weights, strict=True)]
        )
        magnitude = torch.cat(
            [x.new_zeros(0, n).double()]
            + [
                rows.double().abs() @ weight.double().abs()
                for rows, weight in zip(x.split(sizes), weights, strict=True)
            ]
        )
        wide = torch.empty(sum(sizes), 2 * k, dtype=dtype, device=draw.device)
        wide[:, ::2] = x
        for tokens, matrices, counts in (
            (x, weights, group_sizes),
            (wide[:, ::2], weights.contiguous(), group_sizes.int()),
        ):
            out = grouped_gemm.grouped_gemm(tokens, matrices, counts)
            worst = max(worst, error(out, exact, k, magnitude))
    return worst


def grouped_gemm_of_bf16(draw: Draw) -> float:
    return _grouped_gemm(draw, torch.bfloat16)


def grouped_gemm_of_fp16(draw: Draw) -> float:
    return _grouped_gemm(draw, torch.float16)


def grouped_gemm_of_fp32(draw: Draw) -> float:
    return _grouped_gemm(draw, torch.float32)


def grouped_gemm_of_many_experts(draw: Draw) -> float:
    sizes = draw.numpy.multinomial(200, draw.numpy.dirichlet(np.full(70, 0.2))).tolist()
    x, weights = draw.normal(200, 24), draw.normal(70, 24, 16)
    out = grouped_gemm.grouped_gemm(x, weights, torch.tensor(sizes, device=draw.device))
    expert = torch.arange(70, device=draw.device).repeat_interleave(torch.tensor(sizes, device=draw.device))
    exact = torch.einsum("tk,tkn->tn", x.double(), weights.double()[expert])
    magnitude = torch.einsum("tk,tkn->tn", x.double().abs(), weights.double().abs()[expert])
    return error(out, exact, 24, magnitude)


def grouped_gemm_of_sizes_short_of_the_tokens(draw: Draw) -> float:
    # A tile of the last group reaches past its rows; in full groups the next tile would cover that up.
    x, weights = draw.normal(60, 24), draw.normal(2, 24, 16)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills new tensors with NaN
    out = grouped_gemm.grouped_gemm(x, weights, torch.tensor([30, 5], device=draw.device))
    torch.use_deterministic_algorithms(deterministic)
    return 0.0 if bool(out[35:].isnan().all()) and not bool(out[:35].isnan().any()) else torch.inf


def _dispatch_shapes() -> list[tuple[int, int, int, int]]:
    return [(0, 2, 4, 8), (1, 1, 1, 1), (17, 2, 5, 100), (3, 3, 3, 2500), (9, 8, 64, 48)]


def permute_tokens(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for num_tokens, top_k, num_experts, hidden_size in _dispatch_shapes():
            ids = draw.distinct(num_experts, num_tokens, top_k)
            x = draw.normal(num_tokens, hidden_size, dtype=dtype)
            rows = permute.permute_tokens(x, permute.expert_order(ids, num_experts))
            choices = sorted(range(ids.numel()), key=lambda choice: int(ids.flatten()[choice]))
            sources = torch.tensor(choices, dtype=torch.int64, device=draw.device) // top_k
            worst = max(worst, error(rows, x.double()[sources]))
    return worst


def unpermute_tokens(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for num_tokens, top_k, num_experts, hidden_size in _dispatch_shapes():
            order = permute.expert_order(draw.distinct(num_experts, num_tokens, top_k), num_experts)
            rows = draw.normal(num_tokens * top_k, hidden_size, dtype=dtype)
            weights = torch.softmax(draw.normal(num_tokens, top_k), dim=1)
            for routing_weights in (weights, weights.to(dtype)):
                out = permute.unpermute_tokens(rows, order, routing_weights)
                chosen = rows.double()[order.destinations] * routing_weights.double().unsqueeze(-1)
                worst = max(worst, error(out, chosen.sum(1), 2 * top_k, chosen.abs().sum(1)))
    return worst


def stream_contention(draw: Draw) -> float:
    worst = 0.0
    for size, num_programs, num_rounds in (
        (0, 1, 2),
        (1, 3, 1),
        (10_000, 2, 3),
        (20_001, 7, 2),
        (5000, 2, 0),
    ):
        out, x = draw.normal(size), draw.normal(size)
        exact = out.double() + num_rounds * x.double()
        magnitude = num_rounds * (out.double().abs() + num_rounds * x.double().abs())
        contention.stream_contention(out, x, num_programs=num_programs, num_rounds=num_rounds)
        worst = max(worst, error(out, exact, 1, magnitude))
    return worst


def add_rms_norm(draw: Draw) -> float:
    worst = 0.0
    for dtype in DTYPES:
        for num_tokens, hidden_size in ((0, 16), (3, 1), (5, 100), (4, 1024), (2, 5120)):
            x, residual = (draw.normal(num_tokens, hidden_size, dtype=dtype) for _ in range(2))
            weight = draw.normal(hidden_size, dtype=dtype)
            out, new_residual = rms_norm.add_rms_norm(x, residual, weight, epsilon=1e-5)
            magnitude = x.double().abs() + residual.double().abs()
            worst = max(worst, error(new_residual, x.double() + residual.double(), 1, magnitude))
            stream = new_residual.double()
            scale = (stream.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            # Halved by the root: the sum's roundings; whole: the division, the root and two products.
            worst = max(worst, error(out, stream * scale * weight.double(), hidden_size // 2 + 6))
    return worst


CASES: dict[str, Callable[[Draw], float]] = {
    case.__name__: case
    for case in (
        add_rms_norm,
        empty_launch,
        gather_rows,
        gather_rows_outside_the_table,
        grouped_gemm_of_bf16,
        grouped_gemm_of_fp16,
        grouped_gemm_of_fp32,
        grouped_gemm_of_many_experts,
        grouped_gemm_of_sizes_short_of_the_tokens,
        permute_tokens,
        stream_contention,
        stream_copy,
        stream_triad,
        strided_gather,
        unpermute_tokens,
    )
}
# Only the kernels take these: the CPU path refuses them.
UNCHECKED = {"gather_rows_outside_the_table", "grouped_gemm_of_sizes_short_of_the_tokens"}


def interpret() -> None:
    """Print the worst error of each case, every kernel run by Triton's interpreter on CPU tensors."""
    # Fills new tensors with NaN, which shows an element that no program writes.
    torch.use_deterministic_algorithms(True)
    for module in MODULES:
        module.uses_kernel = lambda where, device: True
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=7)
    print(json.dumps({name: case(Draw("cpu")) for name, case in CASES.items()}))


@pytest.fixture(scope="module")
def interpreted_errors() -> dict[str, float]:
    """Return the worst error of each case, from the child process."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-P", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_an_interpreted_kernel_is_as_exact_as_its_number_type(interpreted_errors, case):
    # Where hardware rounds to bf16, the interpreter cuts off, which is wrong by twice as much.
    assert interpreted_errors[case] <= 2.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_on_a_gpu_is_as_exact_as_its_number_type(case):
    assert CASES[case](Draw("cuda")) <= 1.0


@pytest.mark.parametrize("case", sorted(set(CASES) - UNCHECKED))
def test_a_reference_is_as_exact_as_its_number_type(case):
    assert CASES[case](Draw("cpu")) <= 1.0


if __name__ == "__main__":
    interpret()
