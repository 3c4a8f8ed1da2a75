"""The measurement file: what it survives, what it refuses, and what is read from it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import ExecutionError, SpecError
from meshwright.hardware_specs.catalog import load_gpu
from meshwright.profiler.device import Device
from meshwright.profiler.eager_layers import fused_bytes
from meshwright.profiler.failures import Failure
from meshwright.profiler.measurements import OperatorSamples
from meshwright.profiler.protocol import Timing
from meshwright.profiler.reading import derived_constants
from meshwright.profiler.records import (
    ConstantRecord,
    FinishedRecord,
    HeaderRecord,
    Record,
    SampleRecord,
    SentinelRecord,
    identity_of,
    parse_record,
    record_line,
)
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.store import MeasurementLog, read_measurements
from meshwright.simcore.domain.model_catalog import load_model

ROOT = Path(__file__).resolve().parents[2]
H200 = Device(
    type="cuda",
    name="NVIDIA H200",
    gpu="h200-sxm-141",
    num_devices=8,
    num_sms=132,
    memory_bytes=1.5e11,
    l2_bytes=6e7,
    software={"torch": "2.11.0+cu130", "driver": "580.1", "cuda": "13.0"},
)
SETTINGS = ProfileSettings()
SOURCE = "profiled on NVIDIA H200 with torch 2.11.0, driver 580.1"


def sample(seconds: float | None = 1e-3, **changes: object) -> SampleRecord:
    record = SampleRecord(
        suite="gemm",
        operator="gemm",
        precision="bf16",
        shape={"m": 1, "n": 2, "k": 3},
        status="ok",
        seconds=seconds,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]  # names are checked by the dataclass


def stream(operator: str, num_bytes: float, seconds: float) -> SampleRecord:
    return sample(seconds, suite="copies", operator=operator, shape={"num_bytes": num_bytes})


def attention(operator: str, length: int, seconds: float) -> SampleRecord:
    shape = {"batch_size": 1, "sequence_length": length, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64}
    return sample(seconds, suite="attention", operator=operator, shape=shape)


def constant(name: str, value: float) -> ConstantRecord:
    return ConstantRecord(suite="sustained", name=name, value=value, status="ok")


def written(path: Path, *records: Record, device: Device = H200) -> Path:
    with MeasurementLog.open(path, device, SETTINGS) as log:
        for record in records:
            log.append(record)
    return path


def test_every_record_reads_back() -> None:
    timing = Timing(
        seconds=1e-3,
        p10=0.9e-3,
        p90=1.2e-3,
        minimum=0.8e-3,
        repeats=20,
        spread=0.3,
        mode="graph",
        wall_seconds=0.1,
    )
    settings = {"points": {"gemm": 3}, "model": None}
    records: list[Record] = [
        HeaderRecord(device=H200, settings=settings),
        HeaderRecord(device=dataclasses.replace(H200, gpu=None), settings=settings),
        sample().with_result(timing),
        sample().with_result(Failure(status="unsupported", reason="no fp8 'here' \u00e9")),
        constant("sustained_clock.bf16", 0.8),
        ConstantRecord(suite="launch", name="launch.graph", value=None, status="failed", reason="why"),
        SentinelRecord(name="gemm.1024", seconds=1e-4, elapsed=30.0),
        FinishedRecord(suite="collectives"),
    ]
    for record in records:
        line = record_line(record)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        back = parse_record(line[:-1], "file:1")
        assert type(back) is type(record)
        if not (isinstance(record, SampleRecord) and record.status != "ok"):
            assert back == record
    assert list(json.loads(record_line(sample().with_result(timing)))) == [
        "kind",
        "suite",
        "operator",
        "precision",
        "shape",
        "status",
        "seconds",
        "p10",
        "p90",
        "minimum",
        "repeats",
        "mode",
        "wall_seconds",
        "clock_hertz",
        "temperature_celsius",
        "power_watts",
        "reason",
    ]


def test_a_new_file_begins_with_the_device_and_the_settings(tmp_path: Path) -> None:
    settings = ProfileSettings(model=load_model("llama-3-8b"), seed=3)
    path = tmp_path / "a.jsonl"
    MeasurementLog.open(path, H200, settings).close()
    header = json.loads(path.read_text(encoding="ascii"))
    assert (header["kind"], header["schema_version"], header["written_by"]) == ("header", 1, "meshwright")
    assert header["device"]["gpu"] == "h200-sxm-141"
    assert header["device"]["software"]["driver"] == "580.1"
    assert (header["settings"]["seed"], header["settings"]["model"]) == (3, load_model("llama-3-8b").name)


def test_every_line_is_on_the_disk_when_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "a.jsonl", []
    fsync = os.fsync

    def counting(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", counting)
    written(path, sample(), sample(), sample())
    assert synced == [1, 2, 3, 4]


def test_a_log_knows_what_earlier_runs_measured(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        sample(shape={"m": 1, "n": 1, "k": 1}),
        sample(shape={"k": 1.0, "m": 1.0, "n": 1.0}),
        sample(shape={"m": 2, "n": 1, "k": 1}, status="unsupported", seconds=None),
        sample(shape={"m": 3, "n": 1, "k": 1}, status="failed", seconds=None),
        sample(shape={"m": 4, "n": 1, "k": 1}, status="out_of_memory", seconds=None),
        constant("sustained_clock.bf16", 0.9),
        FinishedRecord(suite="collectives"),
        SentinelRecord(name="copy", seconds=1.0, elapsed=0.0),
    )
    size = path.stat().st_size
    with MeasurementLog.open(path, H200, SETTINGS) as log:
        names = [identity_of("gemm", "bf16", {"m": m, "n": 1, "k": 1}) for m in (1, 2, 3, 4)]
        clock = identity_of("constant", "", {"name": "sustained_clock.bf16"})
        # Memory that is not there today may be there tomorrow.
        assert log.done == {*names[:3], clock}
        assert log.failed == set(names[1:3])
        assert [log.num_measured(name) for name in names] == [2, 0, 0, 0]
        assert log.finished_suites == {"collectives"}
    assert path.stat().st_size == size


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", sample())
    whole = path.read_bytes()
    for torn in (b"{", record_line(sample())[:-1], record_line(sample())[:40]):
        path.write_bytes(whole + torn)
        with MeasurementLog.open(path, H200, SETTINGS) as log:
            assert path.read_bytes() == whole
            assert len(log.done) == 1
    written(path, sample(shape={"m": 9, "n": 9, "k": 9}))
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("length", [0, 70, 200])
def test_a_torn_header_begins_anew(tmp_path: Path, length: int) -> None:
    path = written(tmp_path / "a.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    written(path, sample())
    assert path.read_bytes() == whole + record_line(sample())


@pytest.mark.parametrize(
    "content",
    [
        b"notes",
        b"notes\nof mine\n",
        b"\n",
        b"{",
        b'{"kind": "header"',
        b'{"kind": "header", "schema_version": 1, "written_by": "someone else"}\n',
        b'{"kind": "header", "schema_version": 1, "written_by": "someone else"',
        b'{"kind": "header", "schema_version": 2, "written_by": "meshwright"}\n',
        b"\x00\xff\xfe\n",
    ],
)
def test_a_foreign_file_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"notes\.txt"):
        MeasurementLog.open(path, H200, SETTINGS)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"not json", "malformed JSON"),
        (b"", "malformed JSON"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe", "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"kind": "simple"}', "did you mean 'sample'"),
        (b'{"kind": "sample"}', "key 'status' is missing"),
        (b'{"kind": "finished", "suite": "a", "suit": 1}', "unknown key 'suit'; did you mean 'suite'"),
        (b'{"kind": "finished", "suite": 1}', "suite: expected a text"),
        (b'{"kind": "finished", "suite": "a", "suite": "b"}', "given twice"),
        (b'{"kind": "sentinel", "name": "a", "seconds": 0, "elapsed": 1}', "seconds must be above zero"),
        (b'{"kind": "sentinel", "name": "a", "seconds": 1, "elapsed": true}', "elapsed: expected a number"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path / "a.jsonl", sample())
    content = path.read_bytes() + line + b"\n" + record_line(sample())
    path.write_bytes(content)
    for use in (lambda: MeasurementLog.open(path, H200, SETTINGS), lambda: read_measurements([path])):
        with pytest.raises(SpecError, match=message) as caught:
            use()
        assert str(caught.value).startswith(f"{path}:3")
    assert path.read_bytes() == content


def test_another_device_and_other_software_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl")
    other = dataclasses.replace(H200, name="NVIDIA H100 80GB HBM3", gpu="h100-sxm-80")
    with pytest.raises(SpecError, match=r"NVIDIA H200.*NVIDIA H100 80GB HBM3"):
        MeasurementLog.open(path, other, SETTINGS)
    newer = dataclasses.replace(H200, software={**H200.software, "torch": "2.13.0"})
    with pytest.raises(SpecError, match=r"torch 2\.11\.0\+cu130 there, 2\.13\.0 here"):
        MeasurementLog.open(path, newer, SETTINGS)
    python = dataclasses.replace(H200, software={**H200.software, "python": "3.13"})
    MeasurementLog.open(path, python, SETTINGS).close()


def test_one_profiler_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with MeasurementLog.open(path, H200, SETTINGS):
        code = (
            "import pathlib, sys\n"
            "from meshwright.errors import SpecError\n"
            "from meshwright.profiler.device import Device\n"
            "from meshwright.profiler.settings import ProfileSettings\n"
            "from meshwright.profiler.store import MeasurementLog\n"
            f"device = {H200!r}\n"
            "try:\n"
            "    MeasurementLog.open(pathlib.Path(sys.argv[1]), device, ProfileSettings())\n"
            "except SpecError as error:\n"
            "    print(error)\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "another profiler is writing this file" in done.stdout
        with pytest.raises(SpecError, match="another profiler"):
            MeasurementLog.open(path, H200, SETTINGS)
    MeasurementLog.open(path, H200, SETTINGS).close()


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no folder"):
        MeasurementLog.open(tmp_path / "missing" / "a.jsonl", H200, SETTINGS)
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(SpecError, match="is not a file"):
            MeasurementLog.open(path, H200, SETTINGS)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    write = os.write

    def half(descriptor: int, data: bytes) -> int:
        if len(data) > 20:
            return write(descriptor, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with MeasurementLog.open(path, H200, SETTINGS) as log:
        whole = path.read_bytes()
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(ExecutionError, match="No space left on device"):
            log.append(sample())
        monkeypatch.undo()
        assert path.read_bytes() == whole
        assert not log.done
        log.append(sample())
    assert path.read_bytes() == whole + record_line(sample())


def test_samples_are_grouped_and_repeats_become_their_median(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        sample(3e-3, shape={"m": 2, "n": 1, "k": 1}),
        sample(1e-3),
        sample(5e-3),
        sample(2e-3),
        sample(1e-3, precision="fp8"),
        sample(None, status="failed", reason="x", shape={"m": 7, "n": 7, "k": 7}),
        sample(operator="layer", shape={"name": "self-check"}),
        SentinelRecord(name="copy", seconds=1.0, elapsed=0.0),
    )
    measured = read_measurements([path])
    assert (measured.gpu, measured.kernels) == ("h200-sxm-141", "torch 2.11.0")
    assert [samples.name for samples in measured.operators] == ["gemm.bf16", "gemm.fp8"]
    products = measured.operators[0]
    assert products.source == SOURCE
    assert products.seconds.tolist() == [2e-3, 3e-3]
    assert {name: column.tolist() for name, column in products.shape.items()} == {
        "m": [1.0, 2.0],
        "n": [2.0, 1.0],
        "k": [3.0, 1.0],
    }
    assert measured.inputs == (("a.jsonl", hashlib.sha256(path.read_bytes()).hexdigest(), 8),)


def test_collectives_are_grouped_by_ranks(tmp_path: Path) -> None:
    records = [
        sample(
            1e-6 * ranks * size,
            operator="all_reduce",
            precision="",
            shape={"ranks": ranks, "num_bytes": size},
        )
        for ranks in (8, 2)
        for size in (4096, 1024)
    ]
    measured = read_measurements([written(tmp_path / "a.jsonl", *records)])
    assert [(each.collective, each.ranks) for each in measured.collectives] == [
        ("all_reduce", 2),
        ("all_reduce", 8),
    ]
    assert measured.collectives[0].num_bytes.tolist() == [1024.0, 4096.0]
    assert measured.collectives[0].seconds.tolist() == pytest.approx([2048e-6, 8192e-6])
    assert measured.collectives[0].source == SOURCE


def test_constants_are_kept_by_name_and_failures_are_not(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl",
        constant("sustained_clock.bf16", 0.8),
        constant("launch.eager", 5e-6),
        constant("launch.eager", 7e-6),
        ConstantRecord(suite="a", name="launch.graph", value=None, status="failed", reason="x"),
    )
    constants = read_measurements([path]).constants
    assert {name: each.value for name, each in constants.items()} == pytest.approx(
        {"sustained_clock.bf16": 0.8, "launch.eager": 6e-6}
    )
    assert constants["launch.eager"].source == SOURCE


def test_constants_that_follow_from_samples_are_derived(tmp_path: Path) -> None:
    bandwidth = load_gpu("h200-sxm-141").memory_bandwidth_bytes_per_second
    path = written(
        tmp_path / "a.jsonl",
        # In the cache: faster than memory, and no measure of it.
        stream("copy", 2**26, 2**26 / (2.0 * bandwidth)),
        stream("copy", 2**30, 2**30 / (0.9 * bandwidth)),
        stream("copy", 2**31, 2**31 / (0.8 * bandwidth)),
        attention("attention_prefill", 1024, 1e-3),
        attention("attention_prefill", 2048, 4e-3),
        attention("attention_prefill", 4096, 16e-3),
        attention("attention_backward", 1024, 5e-3),
        attention("attention_backward", 2048, 12.5e-3),
        attention("attention_backward", 8192, 1.0),
    )
    constants = read_measurements([path]).constants
    assert constants["memory_stream.efficiency"].value == pytest.approx(0.9)
    # 2.5 * 1 / 5 and 2.5 * 4 / 12.5; the other shapes were measured one way only.
    assert constants["attention.backward_efficiency"].value == pytest.approx((0.5 + 0.8) / 2)
    assert SOURCE in constants["memory_stream.efficiency"].source


def test_a_layer_eager_and_compiled_gives_the_factor_of_eager_kernels(tmp_path: Path) -> None:
    bandwidth = load_gpu("h200-sxm-141").memory_bandwidth_bytes_per_second
    widths = {
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
    }
    shape = {"name": "forward", **widths, "batch_size": 1, "sequence_length": 4096}
    fused = fused_bytes(
        "forward", "bf16", {name: float(size) for name, size in shape.items() if name != "name"}
    )
    rows = [
        sample(
            3e-3 + factor * fused / (0.9 * bandwidth),
            suite="layer",
            operator="layer",
            shape=shape | {"compiled": flag},
        )
        for flag, factor in ((0, 2.6), (1, 1.0))
    ]
    copy, launch = (
        stream("copy", 2**30, 2**30 / (0.9 * bandwidth)),
        constant("software.all.host_launch_latency", 4e-6),
    )
    name = "software.all.eager_elementwise_factor"
    found = read_measurements([written(tmp_path / "a.jsonl", copy, launch, *rows)]).constants
    assert found[name].value == pytest.approx(2.6)
    assert found[name].source == f"{SOURCE}; a layer eager and compiled"
    # Without the bandwidth of copies, the time of a launch or one of the layers there is nothing to tell it from.
    for number, lacking in enumerate(([launch, *rows], [copy, *rows], [copy, launch, rows[0]])):
        assert name not in read_measurements([written(tmp_path / f"{number}.jsonl", *lacking)]).constants


def test_a_measured_constant_goes_before_a_derived_one(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", stream("copy", 2**30, 1.0), constant("memory_stream.efficiency", 0.7)
    )
    assert read_measurements([path]).constants["memory_stream.efficiency"].value == 0.7


def test_small_copies_count_where_there_are_no_large_ones() -> None:
    copies = OperatorSamples(
        operator="copy",
        precision="bf16",
        shape={"num_bytes": np.array([1e6, 2e6])},
        seconds=np.array([1e-3, 1e-3]),
        source="s",
    )
    assert derived_constants([copies], 4e9, 1e9)["memory_stream.efficiency"].value == pytest.approx(0.5)
    assert derived_constants([], 4e9, 1e9) == {}


def test_files_of_one_device_are_read_together(tmp_path: Path) -> None:
    newer = dataclasses.replace(H200, software={"torch": "2.13.0"})
    paths = [
        written(tmp_path / "a.jsonl", sample(1e-3)),
        written(tmp_path / "b.jsonl", sample(3e-3), device=newer),
    ]
    measured = read_measurements(paths)
    assert measured.operators[0].seconds.tolist() == [2e-3]
    assert measured.kernels == "torch 2.11.0 and torch 2.13.0"
    assert measured.operators[0].source == f"{SOURCE} and torch 2.13.0"
    assert [name for name, _, _ in measured.inputs] == ["a.jsonl", "b.jsonl"]


def test_files_of_two_devices_are_not(tmp_path: Path) -> None:
    other = dataclasses.replace(H200, name="NVIDIA L4", gpu="l4")
    paths = [
        written(tmp_path / "a.jsonl", sample()),
        written(tmp_path / "b.jsonl", sample(), device=other),
    ]
    with pytest.raises(SpecError, match=r"b\.jsonl: is of NVIDIA L4 \(l4\), and .*NVIDIA H200"):
        read_measurements(paths)


def test_an_unknown_device_needs_its_spec_named(tmp_path: Path) -> None:
    unknown = dataclasses.replace(H200, name="NVIDIA X1", gpu=None)
    path = written(tmp_path / "a.jsonl", sample(), device=unknown)
    with pytest.raises(SpecError, match=r"'NVIDIA X1' has no spec.*--gpu"):
        read_measurements([path])
    assert read_measurements([path], "H100-80GB-SXM").gpu == "h100-sxm-80"
    with pytest.raises(SpecError, match="did you mean"):
        read_measurements([path], "h100-sxn-80")
    known = written(tmp_path / "b.jsonl", sample())
    with pytest.raises(SpecError, match="is of h200-sxm-141, not of l4"):
        read_measurements([known], "l4")
    assert read_measurements([known], "h200").gpu == "h200-sxm-141"


Change = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(seconds=0), "seconds must be above zero"),
        (lambda row: row.update(seconds=-1.0), "seconds must be above zero"),
        (lambda row: row.update(seconds=float("nan")), "NaN is not a finite number"),
        (lambda row: row.update(seconds=float("inf")), "Infinity is not a finite number"),
        (lambda row: row.update(seconds=10**400), "seconds is not a finite number"),
        (lambda row: row.update(seconds=None), "seconds: expected a number, not null"),
        (lambda row: row.update(status="fine"), "status: 'fine' is not one of ok"),
        (lambda row: row.update(shape={"m": 1, "n": 1}), "k of gemm must be a number"),
        (lambda row: row.update(shape={"m": 1, "n": 1, "k": "x"}), "k of gemm must be a number"),
        (lambda row: row.update(shape={"m": 1, "n": 1, "k": -1}), "k of gemm must be a number"),
        (lambda row: row.update(shape={"m": 1, "n": 1, "k": 1, "j": 1}), "gemm has no field 'j'"),
        (
            lambda row: row.update(operator="send", shape={"ranks": 1, "num_bytes": 1}),
            "ranks must be a whole number of at least 2",
        ),
    ],
)
def test_impossible_samples_are_named(tmp_path: Path, change: Change, message: str) -> None:
    path = written(tmp_path / "a.jsonl", sample())
    row = json.loads(record_line(sample()))
    change(row)
    with path.open("a", encoding="ascii") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(SpecError, match=message) as caught:
        read_measurements([path])
    assert str(caught.value).startswith(f"{path}:3")


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(SpecError, match="no such file"):
        read_measurements([path])
    with pytest.raises(SpecError, match="is a directory"):
        read_measurements([tmp_path])
    with pytest.raises(SpecError, match="no measurement file"):
        read_measurements([])
    path.write_bytes(b"")
    with pytest.raises(SpecError, match="is empty"):
        read_measurements([path])
    written(path)
    with pytest.raises(SpecError, match="no measurement that succeeded"):
        read_measurements([path])
    written(path, sample())
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(SpecError, match=r"a\.jsonl:2: the last line is cut off"):
        read_measurements([path])
    path.write_bytes(content.partition(b"\n")[2])
    with pytest.raises(SpecError, match=r"a\.jsonl:1: the header is missing"):
        read_measurements([path])
    path.write_bytes(content + content)
    with pytest.raises(SpecError, match=r"a\.jsonl:3: a second header"):
        read_measurements([path])


@given(st.binary(max_size=200))
def test_no_line_is_a_traceback(line: bytes) -> None:
    with pytest.raises(SpecError, match=r"^f:1"):
        parse_record(line, "f:1")


LINE = record_line(sample(1e-3, reason="why", p10=1e-4))[:-1]


@given(st.integers(0, len(LINE) - 1), st.integers(0, 255))
def test_a_changed_byte_is_an_error_of_ours_or_a_record(position: int, byte: int) -> None:
    line = LINE[:position] + bytes([byte]) + LINE[position + 1 :]
    try:
        outcome: object = parse_record(line, "f:1")
    except SpecError as error:
        outcome = str(error)
    assert isinstance(outcome, SampleRecord) or str(outcome).startswith("f:1")
