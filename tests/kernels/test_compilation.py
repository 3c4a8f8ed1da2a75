"""Every Triton kernel compiles for the GPUs it is meant for, which needs neither a GPU nor a driver."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="kernels need torch, an optional extra")
triton = pytest.importorskip("triton", reason="the kernels under test are Triton's")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skips
from triton.compiler import ASTSource  # noqa: E402

from meshwright.kernels import (  # noqa: E402
    contention,
    gather,
    grouped_gemm,
    launch,
    permute,
    rms_norm,
    streaming,
)

MODULES = (contention, gather, grouped_gemm, launch, permute, rms_norm, streaming)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_stages", "num_warps")


class Target(NamedTuple):
    """A GPU, its shared memory and the word for its tensor cores."""

    gpu: GPUTarget
    shared_memory_bytes: int
    output: str
    tensor_core: str


TARGETS = {
    "ampere": Target(GPUTarget("cuda", 80, 32), 163 * 1024, "ptx", "mma.sync"),
    "hopper": Target(GPUTarget("cuda", 90, 32), 227 * 1024, "ptx", "wgmma.mma_async"),
    "blackwell": Target(GPUTarget("cuda", 100, 32), 227 * 1024, "ptx", "tcgen05.mma"),
    "geforce_blackwell": Target(GPUTarget("cuda", 120, 32), 99 * 1024, "ptx", "mma.sync"),
    "mi300": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, "amdgcn", "mfma"),
}


@dataclass
class Recorder:
    """Stands in for a launch: keeps what Triton would compile."""

    sources: list[tuple[object, dict[str, object]]] = field(default_factory=list)

    def __call__(self, kernel, num_programs, device, *arguments, **constants):
        assert num_programs > 0
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        inspect.signature(kernel.fn).bind(*arguments, **constants)
        signature = dict.fromkeys(constants, "constexpr")
        aligned = [["tt.divisibility", 16]]
        attributes = {}
        for position, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(argument, torch.Tensor):
                signature[name], attributes[(position,)] = POINTERS[argument.dtype], aligned
            elif isinstance(argument, float):
                signature[name] = "fp32"
            elif argument == 1:  # a launch compiles a 1 in
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32"
                if argument % 16 == 0:
                    attributes[(position,)] = aligned
        in_order = {name: signature[name] for name in kernel.arg_names}
        self.sources.append((ASTSource(kernel, in_order, constants, attributes), options))


def launch_every_kernel() -> None:
    """Launch each kernel once or more, on tensors without data."""
    x = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    indices = torch.empty(64, dtype=torch.int64, device="meta")
    choices = torch.empty(1024, 2, dtype=torch.int64, device="meta")
    wide = torch.empty(1024, 512, device="meta")
    contention._launch(wide, wide, num_programs=8, num_rounds=3)
    gather._launch(x, indices, stride=1, num_out=64)
    gather._launch(x[:, :3].contiguous(), None, stride=7, num_out=100)
    launch._launch(x)
    permute._launch_permute(x, choices)
    permute._launch_unpermute(x.repeat(2, 1), choices, wide[:, :2].contiguous())
    rms_norm._launch(x, x, x[0], epsilon=1e-6)
    streaming._launch_copy(x, x)
    streaming._launch_triad(x, x, x, 2.0)
    weights = torch.empty(8, 512, 256, dtype=torch.bfloat16, device="meta")
    for num_tokens in (1024, 512, 64):  # one for each tile
        grouped_gemm._launch(x[:num_tokens], weights, indices[:8])
    grouped_gemm._launch(x[:, :500], weights[:, :500, :100], indices[:8].int())


def compiled(target: Target, source: object, options: dict[str, object]) -> object:
    # The option that every launch sets.
    return triton.compile(source, target=target.gpu, options={**options, "enable_fp_fusion": True})


@pytest.fixture
def recorder(monkeypatch, tmp_path) -> Recorder:
    """Return the stand-in for every launch of the test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    stand_in = Recorder()
    for module in MODULES:
        monkeypatch.setattr(module, "launch", stand_in)
    return stand_in


def use_target(monkeypatch: pytest.MonkeyPatch, name: str) -> Target:
    for module in (contention, grouped_gemm):
        monkeypatch.setattr(module, "is_rocm", lambda: name.startswith("mi"))
    return TARGETS[name]


# GPUs of one vendor differ most in matrix products, which have a test of their own.
@pytest.mark.parametrize("name", ["hopper", "mi300"])
def test_every_kernel_compiles(monkeypatch, recorder, name):
    target = use_target(monkeypatch, name)
    launch_every_kernel()
    kernels = {kernel for module in MODULES for kernel in vars(module) if kernel.endswith("_kernel")}
    assert {source.fn.__name__ for source, _ in recorder.sources} == kernels - {"uses_kernel"}
    for source, options in recorder.sources:
        assert compiled(target, source, options).metadata.shared <= target.shared_memory_bytes


@pytest.mark.parametrize("name", TARGETS)
def test_products_of_16_bit_run_on_tensor_cores(monkeypatch, recorder, name):
    target = use_target(monkeypatch, name)
    x = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    weights = torch.empty(2, 256, 512, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    grouped_gemm._launch(x, weights, torch.empty(2, dtype=torch.int64, device="meta"))
    ((source, options),) = recorder.sources
    kernel = compiled(target, source, options)
    assert target.tensor_core in kernel.asm[target.output]
    assert kernel.metadata.shared <= target.shared_memory_bytes
