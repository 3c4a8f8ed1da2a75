"""What device there is, and which spec of ours it has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu, load_node
from meshwright.profiler import nvidia
from meshwright.profiler.device import Device, DeviceState, device_state, discover_device, gpu_id

GIB = 2.0**30
ROOT = Path(__file__).resolve().parents[2]

# Names as torch reports them, with the memory it reports [GiB].
KNOWN = [
    ("NVIDIA H200", 139.8, "h200-sxm-141"),
    ("NVIDIA H100 80GB HBM3", 79.1, "h100-sxm-80"),
    ("NVIDIA H100 PCIe", 79.1, "h100-pcie-80"),
    ("NVIDIA H100 NVL", 93.0, "h100-nvl-94"),
    ("NVIDIA GH200 480GB", 94.5, "gh200-96"),
    ("NVIDIA A100-SXM4-80GB", 79.2, "a100-sxm-80"),
    ("A100-SXM4-40GB", 39.4, "a100-sxm-40"),  # older drivers leave the maker out
    ("NVIDIA A100 80GB PCIe", 79.2, "a100-pcie-80"),
    ("NVIDIA B200", 178.4, "b200-sxm-180"),
    ("NVIDIA B300 SXM6 AC", 268.0, "b300-sxm-270"),
    ("NVIDIA GB200", 184.0, "gb200"),
    ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA L4", 22.05, "l4"),
    ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.97, "rtx-pro-6000-server"),
    ("NVIDIA GeForce RTX 4090", 23.5, "rtx-4090"),
    ("AMD Instinct MI300X", 191.5, "mi300x"),
    ("AMD Instinct MI300X OAM", 191.5, "mi300x"),
    ("Tesla V100-SXM2-32GB", 31.7, "v100-sxm2-32"),
]


@pytest.mark.parametrize(("name", "gibibytes", "identity"), KNOWN)
def test_a_name_of_torch_finds_its_spec(name: str, gibibytes: float, identity: str) -> None:
    assert gpu_id(name, gibibytes * GIB) == identity


@pytest.mark.parametrize(
    ("name", "gibibytes"),
    [
        ("NVIDIA GeForce GTX 1080", 8.0),
        ("NVIDIA H200 NVL", 139.8),  # another power limit than the SXM part
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8),
        ("NVIDIA A100-SXM4-80GB", 39.4),  # a name and a memory that do not go together
        ("", 80.0),
        ("AC", 80.0),
    ],
)
def test_other_parts_have_no_spec(name: str, gibibytes: float) -> None:
    assert gpu_id(name, gibibytes * GIB) is None


def test_the_host_has_a_spec_and_a_node() -> None:
    assert load_gpu("cpu-host").peak("bf16") > load_gpu("cpu-host").peak("fp32")
    assert load_node("cpu-host-1").gpu.id == "cpu-host"


def test_the_cpu_is_one_thread_of_a_named_processor() -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    device = discover_device("cpu")
    assert (device.type, device.gpu, device.num_devices, device.num_sms) == ("cpu", "cpu-host", 1, 1)
    assert not device.is_gpu
    assert device.torch_name == "cpu"
    assert device.name
    assert device.memory_bytes > 1e9
    assert 1e5 < device.l2_bytes < 1e10
    assert device.software["torch"] == torch.__version__
    assert device_state(device) == DeviceState()


def test_auto_takes_the_cpu_where_torch_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert discover_device().type == "cpu"
    with pytest.raises(CalibrationError, match=r"no GPU found.*--device cpu"):
        discover_device("cuda")


def test_without_torch_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CalibrationError, match=r"pip install 'meshwright\[profile\]'"):
        discover_device()


def fake_cuda(monkeypatch: pytest.MonkeyPatch, name: str, hip: str | None) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    properties = SimpleNamespace(
        total_memory=int(191.5 * GIB) if hip else int(79.1 * GIB),
        multi_processor_count=304 if hip else 132,
        L2_cache_size=4 * 2**20 if hip else 50 * 2**20,
        gcnArchName="gfx942",
        uuid="11111111-2222-3333-4444-555555555555",
    )
    names = ["NVIDIA T400", name, name]
    for attribute, value in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "device_count": lambda: len(names),
        "get_device_name": lambda index: names[index],
        "get_device_properties": lambda index: properties,
        "get_device_capability": lambda index: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, attribute, value)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")


def test_a_gpu_is_described_by_torch_and_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, "NVIDIA H100 80GB HBM3", None)
    monkeypatch.setattr(nvidia, "_nvml", lambda: None)
    asked = []

    def query(fields: str, uuid: str | None) -> list[str]:
        asked.append(uuid)
        return ["580.95.05", "[N/A]", "Enabled"]

    monkeypatch.setattr(nvidia, "_query", query)
    device = discover_device()
    assert (device.type, device.gpu, device.num_devices, device.num_sms) == ("cuda", "h100-sxm-80", 2, 132)
    assert device.l2_bytes == max(50 * 2**20, load_gpu("h100-sxm-80").l2_bytes)
    software = device.software
    assert (software["driver"], software["ecc"], software["cuda"]) == ("580.95.05", "enabled", "13.0")
    assert software["compute_capability"] == "9.0"
    assert "mig" not in software
    assert asked == ["GPU-11111111-2222-3333-4444-555555555555"]


def test_an_amd_gpu_counts_the_cache_behind_its_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda(monkeypatch, "AMD Instinct MI300X OAM", "7.0.2")
    device = discover_device("cuda")
    assert (device.type, device.gpu, device.torch_name) == ("rocm", "mi300x", "cuda")
    assert device.l2_bytes == 256 * 2**20
    assert (device.software["hip"], device.software["architecture"]) == ("7.0.2", "gfx942")
    assert device_state(device) == DeviceState()


def test_nvidia_smi_tells_the_state_in_one_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 2619, 41, 512.35, 0x0000000000000044'\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(nvidia, "_nvml", lambda: None)
    assert nvidia.nvidia_state("GPU-1") == DeviceState(
        sm_clock_hertz=1.98e9,
        memory_clock_hertz=2.619e9,
        temperature_celsius=41.0,
        power_watts=512.35,
        throttle_reasons=("power_cap", "hardware_thermal"),
    )
    program.write_text("#!/bin/sh\necho '[N/A], [N/A], 41, [N/A], [N/A]'\n", encoding="ascii")
    assert nvidia.nvidia_state(None) == DeviceState(temperature_celsius=41.0)
    program.write_text("#!/bin/sh\necho 'Field is not valid'\nexit 2\n", encoding="ascii")
    assert nvidia.nvidia_state(None) == DeviceState()


class FakeNvmlError(Exception):
    pass


def test_nvml_tells_the_state_and_keeps_silent_where_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> object:
        raise FakeNvmlError

    fake = SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 * kind,
        nvmlDeviceGetPowerUsage=lambda handle: 350_000,
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x4,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetMigMode=refuse,
        nvmlDeviceGetEccMode=lambda handle: (0, 0),
    )
    monkeypatch.setattr(nvidia, "_nvml", lambda: fake)
    assert nvidia.nvidia_state("GPU-of-this-test") == DeviceState(
        sm_clock_hertz=1e9, memory_clock_hertz=2e9, power_watts=350.0, throttle_reasons=("power_cap",)
    )
    assert nvidia.nvidia_software("GPU-of-this-test") == {"driver": "580.1", "ecc": "disabled"}


def test_importing_the_profiler_leaves_torch_alone() -> None:
    modules = (
        "meshwright.profiler",
        *(f"meshwright.profiler.{name}" for name in ("device", "store", "profile")),
    )
    code = f"import {', '.join(modules)}, sys\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_a_device_is_a_value() -> None:
    device = Device(type="rocm", name="a", gpu=None, num_devices=1, num_sms=1, memory_bytes=1.0, l2_bytes=1.0)
    assert device.is_gpu
    assert device.software == {}
