"""What the NVIDIA driver tells of a GPU: through NVML where ``pynvml`` is installed, else through ``nvidia-smi``."""

from __future__ import annotations

import functools
import importlib
import math
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DeviceState", "nvidia_software", "nvidia_state", "throttle_names"]

# Bits of "clocks event reasons" in nvml.h; 1 is an idle GPU.
_REASONS: Mapping[int, str] = {
    0x1: "idle",
    0x2: "application_clocks",
    0x4: "power_cap",
    0x8: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
    0x100: "display_clocks",
}
_STATE_QUERY = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
_SOFTWARE_QUERY = "driver_version,mig.mode.current,ecc.mode.current"
_QUERY_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """What a device reads of itself; None where it does not tell.

    Parameters
    ----------
    sm_clock_hertz, memory_clock_hertz : float | None
        Clocks now [Hz].
    temperature_celsius : float | None
        Of the die [C].
    power_watts : float | None
        Averaged over about a second by the driver [W].
    throttle_reasons : tuple[str, ...] | None
        Why clocks are below their maximum; empty when they are not.
    """

    sm_clock_hertz: float | None = None
    memory_clock_hertz: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None
    throttle_reasons: tuple[str, ...] | None = None


def nvidia_state(uuid: str | None) -> DeviceState:
    """Return clocks, temperature, power and throttle reasons of a GPU, the first when ``uuid`` is None."""
    nvml = _nvml()
    handle = None if nvml is None else _handle(uuid)
    if nvml is None or handle is None:
        return _state_from_query(uuid)

    def clock(kind: int) -> float | None:
        megahertz = _number(_ask("DeviceGetClockInfo", handle, kind))
        return None if megahertz is None else megahertz * 1e6

    milliwatts = _number(_ask("DeviceGetPowerUsage", handle))
    mask = _ask("DeviceGetCurrentClocksThrottleReasons", handle)
    return DeviceState(
        sm_clock_hertz=clock(nvml.NVML_CLOCK_SM),
        memory_clock_hertz=clock(nvml.NVML_CLOCK_MEM),
        temperature_celsius=_number(_ask("DeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU)),
        power_watts=None if milliwatts is None else milliwatts / 1e3,
        throttle_reasons=throttle_names(int(mask)) if isinstance(mask, int) else None,
    )


def nvidia_software(uuid: str | None) -> dict[str, str]:
    """Return ``driver``, ``mig`` and ``ecc`` of a GPU, as far as they can be read."""
    handle = None if _nvml() is None else _handle(uuid)
    if handle is None:
        cells = _query(_SOFTWARE_QUERY, uuid)
        found = dict(zip(("driver", "mig", "ecc"), cells, strict=False))
        return {name: text.lower() for name, text in found.items() if _is_told(text)}
    driver = _ask("SystemGetDriverVersion")
    software = {"driver": driver.decode() if isinstance(driver, bytes) else driver}
    for name, question in (("mig", "DeviceGetMigMode"), ("ecc", "DeviceGetEccMode")):
        modes = _ask(question, handle)  # current and pending
        software[name] = None if modes is None else ("enabled" if modes[0] else "disabled")
    return {name: str(text) for name, text in software.items() if text}


def throttle_names(mask: int) -> tuple[str, ...]:
    """Return the names of the bits of NVML's throttle reasons.

    Examples
    --------
    >>> throttle_names(0x44)
    ('power_cap', 'hardware_thermal')
    """
    return tuple(name for bit, name in _REASONS.items() if mask & bit)


@functools.cache
def _nvml() -> Any:
    """Return the module ``pynvml``, started; None where it or the driver's library is missing."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


@functools.cache
def _handle(uuid: str | None) -> Any:
    if uuid is None:
        return _ask("DeviceGetHandleByIndex", 0)
    return _ask("DeviceGetHandleByUUID", uuid)


def _ask(question: str, *arguments: object) -> Any:
    """Return what NVML answers; None where the GPU, the driver or the library does not know the question."""
    nvml = _nvml()
    function = getattr(nvml, f"nvml{question}", None)
    if function is None:
        return None
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None


def _state_from_query(uuid: str | None) -> DeviceState:
    cells = _query(_STATE_QUERY, uuid)
    if len(cells) != len(_STATE_QUERY.split(",")):
        return DeviceState()
    sm, memory, temperature, power = (_number(cell) for cell in cells[:4])
    try:
        reasons = throttle_names(int(cells[4], 16))
    except ValueError:
        reasons = None
    return DeviceState(
        sm_clock_hertz=None if sm is None else sm * 1e6,
        memory_clock_hertz=None if memory is None else memory * 1e6,
        temperature_celsius=temperature,
        power_watts=power,
        throttle_reasons=reasons,
    )


def _query(fields: str, uuid: str | None) -> list[str]:
    """Return the cells of one ``nvidia-smi`` query; none when it is missing, slow or refuses a field."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={uuid or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_QUERY_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines()
    return [cell.strip() for cell in lines[0].split(",")] if done.returncode == 0 and lines else []


def _is_told(cell: str) -> bool:
    return bool(cell) and not cell.startswith("[") and cell.upper() != "N/A"


def _number(cell: object) -> float | None:
    """Return a finite number, None for ``[N/A]`` and its like."""
    try:
        value = float(str(cell))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
