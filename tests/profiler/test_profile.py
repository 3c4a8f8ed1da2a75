"""A whole profile of a made-up suite on the CPU: order, resuming, limits, failures, and being killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshwright.errors import ExecutionError, SpecError
from meshwright.profiler import profile_run, suites
from meshwright.profiler.device import Device, DeviceState
from meshwright.profiler.failures import Failure
from meshwright.profiler.profile import ProfileSummary, Progress, run_profile
from meshwright.profiler.protocol import Timing, timing_of
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case

torch = pytest.importorskip("torch", reason="needs torch")

ROOT = Path(__file__).resolve().parents[2]
CPU = Device(
    type="cpu", name="host", gpu="cpu-host", num_devices=1, num_sms=1, memory_bytes=1e10, l2_bytes=3e7
)
FAST = ProfileSettings(num_passes=1, kernel_seconds=1e-6, min_repeats=3, warm_up=1)


def product(m: int) -> Callable[[], object]:
    return lambda: sum(range(m))


def raising(error: BaseException) -> Callable[[], Callable[[], object]]:
    def prepare() -> Callable[[], object]:
        raise error

    return prepare


def case(
    m: int, prepare: Callable[[], Callable[[], object]] | None = None, *, suite: str = "made_up"
) -> Case:
    return Case(
        suite=suite,
        operator="gemm",
        precision="fp32",
        shape={"m": m, "n": 1, "k": 1},
        prepare=prepare or (lambda: product(m)),
    )


def constant(name: str, value: Callable[[], float], expected_seconds: float = 0.0) -> Case:
    return Case(
        suite="made_up",
        operator="constant",
        precision="",
        shape={"name": name},
        prepare=raising(AssertionError("a constant is not prepared")),
        value=value,
        expected_seconds=expected_seconds,
    )


class MadeUp:
    name = "made_up"

    def __init__(self, cases: Iterable[Case]) -> None:
        self._cases = tuple(cases)

    def cases(self, device: Device, settings: ProfileSettings) -> Iterable[Case]:
        del device, settings
        return self._cases


def install(monkeypatch: pytest.MonkeyPatch, *cases: Case) -> None:
    """Let the profile have one suite, and a sentinel that costs nothing."""
    monkeypatch.setattr(suites, "SUITES", {"made_up": "nowhere"})
    monkeypatch.setattr(suites, "load_suite", lambda name: MadeUp(cases))
    monkeypatch.setattr(profile_run, "measure_sentinels", lambda device, limits: {"gemm.64": 1e-3})


class Clock:
    """Time that passes when the test says so: a busy machine changes nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(profile_run, "time", SimpleNamespace(perf_counter=lambda: self.now))


def rows(path: Path, kind: str = "sample") -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return [row for row in parsed if row["kind"] == kind]


def shapes(path: Path) -> list[int]:
    return [row["shape"]["m"] for row in rows(path)]


def test_every_case_is_measured_once_in_an_order_of_the_seed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, *(case(m) for m in range(20)), case(3), constant("launch.one", lambda: 2.5))
    summary = run_profile(tmp_path / "a.jsonl", CPU, FAST)
    assert summary.counts == {"ok": 21}
    assert summary.num_cases == 21
    assert summary.is_complete
    assert shapes(tmp_path / "a.jsonl") != list(range(20))
    assert sorted(shapes(tmp_path / "a.jsonl")) == list(range(20))
    row = rows(tmp_path / "a.jsonl")[0]
    assert (row["suite"], row["operator"], row["precision"]) == ("made_up", "gemm", "fp32")
    assert (row["status"], row["mode"], row["reason"]) == ("ok", "cpu", "")
    assert rows(tmp_path / "a.jsonl", "constant") == [
        {
            "kind": "constant",
            "suite": "made_up",
            "name": "launch.one",
            "value": 2.5,
            "status": "ok",
            "reason": "",
        }
    ]
    # The constants follow all shapes.
    last = [json.loads(line)["kind"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert last[-2:] == ["constant", "sentinel"]
    run_profile(tmp_path / "b.jsonl", CPU, FAST)
    assert shapes(tmp_path / "b.jsonl") == shapes(tmp_path / "a.jsonl")


def test_a_second_run_measures_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    install(monkeypatch, case(1), case(2), constant("a", lambda: 1.0))
    run_profile(path, CPU, FAST)
    install(monkeypatch, case(1), case(2), case(3), constant("a", lambda: 1.0), constant("b", lambda: 1.0))
    summary = run_profile(path, CPU, FAST)
    assert summary.counts == {"ok": 2}
    assert sorted(shapes(path)) == [1, 2, 3]
    size = path.stat().st_size
    summary = run_profile(path, CPU, FAST)
    assert (summary.counts, summary.is_complete) == ({}, True)
    assert path.stat().st_size == size


def test_passes_go_round_all_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    install(monkeypatch, *(case(m) for m in range(5)), constant("a", lambda: 1.0))
    settings = dataclasses.replace(FAST, num_passes=3, min_repeats=9)
    run_profile(path, CPU, settings)
    order = shapes(path)
    assert [sorted(order[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert len(rows(path, "constant")) == 1
    # Three passes of a third of the repeats each.
    assert {row["repeats"] for row in rows(path)} == {3}
    assert not run_profile(path, CPU, settings).counts


def test_failures_are_rows_and_do_not_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    attempts: list[int] = []

    def no_memory() -> Callable[[], object]:
        attempts.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def value_error() -> float:
        raise RuntimeError("broken")

    install(
        monkeypatch,
        case(1, raising(NotImplementedError("fp8"))),
        case(2, no_memory),
        case(3, lambda: raising(ValueError("at the call"))),
        case(4),
        constant("a", value_error),
        constant("b", lambda: float("nan")),
    )
    summary = run_profile(path, CPU, FAST)
    assert summary.counts == {"unsupported": 1, "out_of_memory": 1, "failed": 3, "ok": 1}
    assert summary.is_complete
    reasons = {row["shape"]["m"]: row["reason"] for row in rows(path)}
    assert reasons == {
        1: "NotImplementedError: fp8",
        2: "OutOfMemoryError: CUDA out of memory",
        3: "ValueError: at the call",
        4: "",
    }
    assert {row["name"]: row["reason"] for row in rows(path, "constant")} == {
        "a": "RuntimeError: broken",
        "b": "the result is nan",
    }
    # Once more after the memory was given back; and in the next run.
    assert len(attempts) == 2
    assert run_profile(path, CPU, FAST).counts == {"out_of_memory": 1}


def test_memory_of_a_case_is_free_before_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alive: set[int] = set()
    most: list[int] = []

    class Operand:
        def __init__(self) -> None:
            alive.add(id(self))
            most.append(len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def prepare() -> Callable[[], object]:
        operand = Operand()
        return lambda: operand

    install(monkeypatch, *(case(m, prepare) for m in range(4)))
    run_profile(tmp_path / "a.jsonl", CPU, FAST)
    assert max(most) == 1


def test_the_time_limit_ends_a_run_cleanly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, clock = tmp_path / "a.jsonl", Clock(monkeypatch)

    def busy() -> Callable[[], object]:
        clock.now += 0.02
        return lambda: None

    install(monkeypatch, *(case(m, busy) for m in range(200)), constant("a", lambda: 1.0, 0.1))
    summary = run_profile(path, CPU, dataclasses.replace(FAST, max_seconds=1.5))
    assert 1.3 < summary.seconds <= 1.5
    # What was kept back for the constant was enough.
    assert len(rows(path, "constant")) == 1
    measured = len(shapes(path))
    assert 1 <= measured < 75
    assert summary.missing == {"made_up": 200 - measured}
    assert not summary.is_complete


def test_a_constant_that_takes_too_long_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, case(1), constant("a", lambda: 1.0, 1000.0))
    summary = run_profile(tmp_path / "a.jsonl", CPU, FAST)
    assert summary.counts == {"ok": 1}
    assert summary.missing == {"made_up": 1}


def test_sentinels_show_drift(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, case(1), case(2))
    rounds: Iterator[float] = iter([1e-3, 1.01e-3, 1.05e-3, 1e-3])
    monkeypatch.setattr(
        profile_run, "measure_sentinels", lambda device, limits: {"gemm.64": next(rounds), "copy.1": 1.0}
    )
    summary = run_profile(tmp_path / "a.jsonl", CPU, dataclasses.replace(FAST, sentinel_interval=0.0))
    # At the start, after each of the two cases, and at the end.
    assert len(rows(tmp_path / "a.jsonl", "sentinel")) == 8
    assert summary.drift == pytest.approx({"gemm.64": 0.05, "copy.1": 0.0})
    assert summary.drifting == ("gemm.64",)


def test_real_sentinels_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(suites, "SUITES", {"made_up": "nowhere"})
    monkeypatch.setattr(suites, "load_suite", lambda name: MadeUp([case(1)]))
    summary = run_profile(tmp_path / "a.jsonl", CPU, FAST)
    assert len(summary.drift) == 8
    assert len(rows(tmp_path / "a.jsonl", "sentinel")) == 16


def test_progress_counts_to_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, *(case(m) for m in range(5)), constant("launch.one", lambda: 1.0))
    seen: list[Progress] = []
    run_profile(tmp_path / "a.jsonl", CPU, FAST, progress=seen.append)
    assert [each.done for each in seen] == [1, 2, 3, 4, 5, 6]
    assert {each.total for each in seen} == {6}
    assert seen[-1].seconds_left == 0.0
    assert seen[-1].label == "launch.one"
    assert all(a.elapsed <= b.elapsed for a, b in itertools.pairwise(seen))


def test_the_state_of_the_device_stands_beside_each_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, case(1))
    state = DeviceState(
        sm_clock_hertz=1.98e9,
        temperature_celsius=50.0,
        power_watts=600.0,
        throttle_reasons=("idle", "power_cap"),
    )
    monkeypatch.setattr(profile_run, "device_state", lambda device: state)
    summary = run_profile(tmp_path / "a.jsonl", CPU, FAST)
    (row,) = rows(tmp_path / "a.jsonl")
    assert (row["clock_hertz"], row["temperature_celsius"], row["power_watts"]) == (1.98e9, 50.0, 600.0)
    assert summary.throttle_reasons == ("power_cap",)


def test_an_interrupt_leaves_a_file_to_go_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    patience = [3]

    def prepare() -> Callable[[], object]:
        patience[0] -= 1
        if patience[0] == 0:
            raise KeyboardInterrupt
        return lambda: None

    install(monkeypatch, *(case(m, prepare) for m in range(6)))
    with pytest.raises(KeyboardInterrupt):
        run_profile(path, CPU, FAST)
    assert len(shapes(path)) == 2
    assert run_profile(path, CPU, FAST).counts == {"ok": 4}
    assert sorted(shapes(path)) == list(range(6))


def test_a_lost_gpu_ends_the_run_and_its_case_is_left_out_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    lost = raising(RuntimeError("CUDA error: an illegal memory access was encountered"))

    def lost_value() -> float:
        raise RuntimeError("CUDA error: unspecified launch failure")

    install(monkeypatch, case(1), case(2, lost), case(3), constant("a", lost_value))
    with pytest.raises(ExecutionError, match=r"gemm\.fp32: the GPU failed.*leaves this case out"):
        run_profile(path, CPU, FAST)
    with pytest.raises(ExecutionError, match="a: the GPU failed"):
        run_profile(path, CPU, FAST)
    assert sorted(shapes(path)) == [1, 2, 3]
    assert run_profile(path, CPU, FAST).counts == {}


def test_an_unknown_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="did you mean 'gemm'"):
        run_profile(tmp_path / "a.jsonl", CPU, ProfileSettings(suites=("gem",)))
    assert not (tmp_path / "a.jsonl").exists()


def collective(size: int) -> Case:
    return Case(
        suite="collectives",
        operator="all_reduce",
        precision="",
        shape={"ranks": 2, "num_bytes": size},
        prepare=raising(AssertionError("measured by the suite")),
    )


def install_collectives(
    monkeypatch: pytest.MonkeyPatch, results: Callable[[], Iterator[tuple[Case, Timing | Failure]]]
) -> None:
    install(monkeypatch, case(1))
    fake = SimpleNamespace(run_collectives=lambda device, settings, is_measured: results())
    monkeypatch.setitem(sys.modules, "made_up_collectives", fake)
    monkeypatch.setattr(suites, "SUITES", {"made_up": "nowhere", "collectives": "made_up_collectives"})


def test_collectives_are_taken_from_their_own_processes_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, starts = tmp_path / "a.jsonl", []

    def results() -> Iterator[tuple[Case, Timing | Failure]]:
        starts.append(1)
        yield collective(1024), timing_of([1e-4], "eager", 0.1)
        yield collective(2048), Failure(status="failed", reason="a process ended")

    install_collectives(monkeypatch, results)
    assert run_profile(path, CPU, FAST).counts == {"ok": 1}
    assert not starts  # one device, and nobody asked
    settings = dataclasses.replace(FAST, with_collectives=True)
    summary = run_profile(path, CPU, settings)
    assert summary.counts == {"ok": 1, "failed": 1}
    assert summary.is_complete
    assert [row["suite"] for row in rows(path, "finished")] == ["collectives"]
    assert run_profile(path, CPU, settings).counts == {}
    assert len(starts) == 1


def test_collectives_end_with_the_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, closed, clock = tmp_path / "a.jsonl", [], Clock(monkeypatch)

    def results() -> Iterator[tuple[Case, Timing | Failure]]:
        try:
            for size in range(1, 10**9):
                clock.now += 0.1
                yield collective(size), timing_of([1e-4], "eager", 0.1)
        finally:
            closed.append(1)

    install_collectives(monkeypatch, results)
    settings = dataclasses.replace(FAST, with_collectives=True, max_seconds=1.0)
    summary = run_profile(path, CPU, settings)
    assert closed == [1]
    assert summary.unfinished_suites == ("collectives",)
    assert not summary.is_complete
    assert summary.seconds < 2.0
    assert summary.counts["ok"] > 2


def test_collectives_go_on_where_they_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, measured = tmp_path / "a.jsonl", []

    def results(
        device: object, settings: object, is_measured: Callable[[Case], bool]
    ) -> Iterator[tuple[Case, Timing | Failure]]:
        for size in (1024, 2048):
            if not is_measured(collective(size)):
                measured.append(size)
                time.sleep(0.6)
                yield collective(size), timing_of([1e-4], "eager", 0.1)

    install_collectives(monkeypatch, lambda: iter(()))
    monkeypatch.setattr(sys.modules["made_up_collectives"], "run_collectives", results)
    settings = dataclasses.replace(FAST, with_collectives=True, max_seconds=0.5)
    assert not run_profile(path, CPU, settings).is_complete
    assert run_profile(path, CPU, dataclasses.replace(settings, max_seconds=10.0)).is_complete
    assert measured == [1024, 2048]


CHILD = """
import sys, time
from pathlib import Path

from meshwright.profiler import profile_run, suites
from meshwright.profiler.device import Device
from meshwright.profiler.profile import run_profile
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case


def prepare():
    end = time.perf_counter() + 0.003
    while time.perf_counter() < end:
        pass
    return lambda: None


class MadeUp:
    name = "made_up"

    def cases(self, device, settings):
        for m in range(40):
            yield Case(
                suite="made_up", operator="gemm", precision="fp32", shape={"m": m, "n": 1, "k": 1}, prepare=prepare
            )


suites.SUITES = {"made_up": "nowhere"}
suites.load_suite = lambda name: MadeUp()
profile_run.measure_sentinels = lambda device, limits: {"gemm.64": 1e-3}
device = Device(
    type="cpu", name="host", gpu="cpu-host", num_devices=1, num_sms=1, memory_bytes=1e10, l2_bytes=3e7
)
settings = ProfileSettings(num_passes=1, kernel_seconds=1e-6, min_repeats=3, warm_up=1)
run_profile(Path(sys.argv[1]), device, settings)
"""


def test_a_killed_profile_keeps_every_whole_line_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, path = tmp_path / "child.py", tmp_path / "a.jsonl"
    program.write_text(textwrap.dedent(CHILD), encoding="ascii")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen([sys.executable, str(program), str(path)], env=environment)
    try:
        end = time.monotonic() + 60.0
        while time.monotonic() < end and child.poll() is None:
            if path.exists() and path.read_bytes().count(b"\n") > 12:
                break
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    killed = path.read_bytes()
    whole = killed[: killed.rfind(b"\n") + 1]
    kept = len(shapes_of(whole))
    assert 10 <= kept < 40

    install(monkeypatch, *(case(m) for m in range(40)))
    summary: ProfileSummary = run_profile(path, CPU, FAST)
    assert path.read_bytes().startswith(whole)
    assert summary.counts == {"ok": 40 - kept}
    run_profile(tmp_path / "uninterrupted.jsonl", CPU, FAST)
    assert sorted(shapes(path)) == sorted(shapes(tmp_path / "uninterrupted.jsonl")) == list(range(40))


def shapes_of(content: bytes) -> list[object]:
    parsed = [json.loads(line) for line in content.splitlines()]
    return [row["shape"] for row in parsed if row["kind"] == "sample"]
