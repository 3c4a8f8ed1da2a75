"""The device a profile runs on: what it is, and what it reads of itself while it works."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import list_specs, load_gpu
from meshwright.profiler.nvidia import DeviceState, nvidia_software, nvidia_state

__all__ = ["Device", "DeviceState", "DeviceType", "device_state", "discover_device", "gpu_id"]

DeviceType = Literal["cuda", "rocm", "cpu"]

# What drivers append to the name of one and the same part: boards, virtual functions, packages.
_BOARD_WORDS = ("ac", "hf", "oam", "sxm6", "vf")
# Torch reports up to a tenth less than the data sheet's memory (ECC, reserved); variants differ by a fifth or more.
_MEMORY_TOLERANCE = 0.12
# Last-level cache of a host that does not tell [B].
_HOST_CACHE_BYTES = 32 * 2.0**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One kind of device of this node.

    Parameters
    ----------
    type : DeviceType
        What runs the kernels; ``cuda`` and ``rocm`` are both torch's ``cuda``.
    name : str
        As the driver spells it.
    gpu : str | None
        Id of our spec; None when we have none.
    num_devices : int
        How many of them the node has.
    num_sms : int
        Streaming multiprocessors (compute units); threads used on a CPU.
    memory_bytes, l2_bytes : float
        [B]
    software : Mapping[str, str]
        Versions: driver, cuda or hip, torch, triton, nccl, ...
    """

    type: DeviceType
    name: str
    gpu: str | None
    num_devices: int
    num_sms: int
    memory_bytes: float
    l2_bytes: float
    software: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """Whether torch calls it ``cuda``."""
        return self.type != "cpu"

    @property
    def torch_name(self) -> str:
        """Torch's name of the device."""
        return "cuda" if self.is_gpu else "cpu"


def discover_device(kind: Literal["auto", "cuda", "cpu"] = "auto") -> Device:
    """Return the device of this node that a profile runs on.

    Parameters
    ----------
    kind : {'auto', 'cuda', 'cpu'}
        ``auto`` takes the GPU where torch sees one, else the CPU; ``cuda`` is any GPU of torch, ROCm's too.

    Raises
    ------
    CalibrationError
        If torch is missing, or a GPU is asked for and there is none.
    """
    try:
        import torch
    except ImportError:
        raise CalibrationError(
            "profiling needs torch, which is not installed; run pip install 'meshwright[profile]'"
        ) from None
    has_gpu = kind != "cpu" and torch.cuda.is_available()
    if kind == "cuda" and not has_gpu:
        raise CalibrationError(
            f"no GPU found (torch {torch.__version__} sees none); check the driver and that torch is built for"
            " it, or measure the processor with --device cpu"
        )
    return _gpu_device() if has_gpu else _cpu_device()


def device_state(device: Device) -> DeviceState:
    """Return what the device reads of itself now; blank on a CPU and where nothing tells.

    Cheap through NVML (well under a millisecond), some 50 ms through ``nvidia-smi``.
    """
    return nvidia_state(_uuid()) if device.type == "cuda" else DeviceState()


def gpu_id(name: str, memory_bytes: float) -> str | None:
    """Return the id of our spec for a device as torch names it, None when there is none.

    Parameters
    ----------
    name : str
        Such as ``NVIDIA H100 80GB HBM3``.
    memory_bytes : float
        As torch reports it; a spec with other memory is another part [B].

    Examples
    --------
    >>> gpu_id("NVIDIA H100 80GB HBM3", 79.1 * 2**30)
    'h100-sxm-80'
    >>> gpu_id("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8 * 2**30)
    """
    words = _spelling(name).split("-")
    while words and words[-1] in _BOARD_WORDS:
        words.pop()
    spelling = "-".join(words)
    known = _known_spellings()
    found = known.get(spelling) or known.get(f"nvidia-{spelling}")
    if found is None:
        return None
    expected = load_gpu(found).memory_bytes
    return found if abs(memory_bytes / expected - 1.0) <= _MEMORY_TOLERANCE else None


@functools.cache
def _known_spellings() -> Mapping[str, str]:
    """Return the ids of all GPUs by every spelling of theirs."""
    known: dict[str, str] = {}
    for identity in list_specs("gpu"):
        gpu = load_gpu(identity)
        for text in (gpu.id, *gpu.aliases, gpu.name):
            known.setdefault(_spelling(text), identity)
    return known


def _spelling(text: str) -> str:
    return "-".join(text.lower().replace("_", " ").replace("-", " ").split())


def _gpu_device() -> Device:
    import torch

    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    names = [torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count())]
    name, memory = names[index], float(properties.total_memory)
    gpu = gpu_id(name, memory)
    # AMD's Infinity Cache stands behind the L2 that torch reports; what flushes must flush both.
    caches = [float(getattr(properties, "L2_cache_size", 0)), load_gpu(gpu).l2_bytes if gpu else 0.0]
    software = _torch_software()
    if torch.version.hip is None:
        software |= nvidia_software(_uuid())
    return Device(
        type="cuda" if torch.version.hip is None else "rocm",
        name=name,
        gpu=gpu,
        num_devices=names.count(name),
        num_sms=int(properties.multi_processor_count),
        memory_bytes=memory,
        l2_bytes=max(caches),
        software=software,
    )


def _torch_software() -> dict[str, str]:
    """Return the versions that torch knows, of a GPU build."""
    import torch

    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    cudnn: Any = torch.backends.cudnn  # partly typed
    found: dict[str, object] = {
        "torch": torch.__version__,
        "triton": _installed("triton", "pytorch-triton", "pytorch-triton-rocm"),
        "cudnn": cudnn.version() if cudnn.is_available() else None,
        "nccl": _nccl_version(),
    }
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        found |= {"cuda": torch.version.cuda, "compute_capability": f"{major}.{minor}"}
    else:
        found |= {
            "hip": torch.version.hip,
            "architecture": getattr(properties, "gcnArchName", None),
            "driver": _first_line("/sys/module/amdgpu/version"),
        }
    return {name: str(value) for name, value in found.items() if value}


def _nccl_version() -> str | None:
    """Return the version of NCCL (RCCL) inside torch; builds without it have none."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    nccl: Any = torch.cuda.nccl  # not typed
    version = nccl.version()
    return ".".join(str(part) for part in version) if isinstance(version, tuple) else str(version)


def _uuid() -> str | None:
    """Return the driver's name of torch's current GPU; its number differs under ``CUDA_VISIBLE_DEVICES``."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return None if uuid is None else f"GPU-{uuid}"


def _cpu_device() -> Device:
    import torch

    software = {
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    return Device(
        type="cpu",
        name=_cpu_name(),
        gpu="cpu-host",
        num_devices=1,
        num_sms=1,
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        l2_bytes=_host_cache_bytes(),
        software={name: text for name, text in software.items() if text},
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"


def _host_cache_bytes() -> float:
    """Return the size of the last-level cache of the first core [B]."""
    if shutil.which("getconf") is None:
        return _HOST_CACHE_BYTES
    sizes = [_getconf(f"LEVEL{level}_CACHE_SIZE") for level in (4, 3, 2)]
    return next((size for size in sizes if size > 0.0), _HOST_CACHE_BYTES)


def _getconf(name: str) -> float:
    done = subprocess.run(["getconf", name], capture_output=True, text=True, check=False, timeout=10.0)
    text = done.stdout.strip()
    return float(text) if done.returncode == 0 and text.isdigit() else 0.0


def _installed(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()[0].strip()
    except (OSError, IndexError):
        return None
