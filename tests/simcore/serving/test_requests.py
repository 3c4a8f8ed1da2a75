"""Synthetic requests and recorded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serving_deployments import table_of, workload

from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import LengthDistribution
from meshwright.simcore.serving.requests import RequestTable, generate_requests, sample_lengths
from meshwright.simcore.serving.traces import load_requests, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3]}
{"timestamp": 3000, "input_length": 1100, "output_length": 490, "hash_ids": [0, 1, 20]}
"""
OURS = """{"arrival_time_s": 0.5, "input_length": 100, "output_length": 5, "prefix_group": "a", "prefix_length": 64}
{"arrival_time_s": 1.5, "input_length": 90, "output_length": 7, "prefix_group": "a", "prefix_length": 64}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "trace"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "times", "inputs", "outputs"),
    [
        (AZURE, [0.0, 4.314579], [374, 396], [44, 109]),
        (AZURE_2024, [0.0, 0.007405], [2162, 2399], [5, 6]),
        (BURST, [0.0, 40.0], [472, 1087], [18, 230]),
        (MOONCAKE, [0.0, 3.0], [6758, 1100], [500, 490]),
        (OURS, [0.0, 1.0], [100, 90], [5, 7]),
        ("num_prefill_tokens,num_decode_tokens\n10,20\n30,40\n", [0.0, 0.0], [10, 30], [20, 40]),
    ],
)
def test_traces_are_read(
    tmp_path: Path, text: str, times: list[float], inputs: list[int], outputs: list[int]
) -> None:
    trace = read_trace(write(tmp_path, text))
    np.testing.assert_allclose(trace.requests.arrival_time, times, atol=1e-6)
    np.testing.assert_array_equal(trace.requests.input_length, inputs)
    np.testing.assert_array_equal(trace.requests.output_length, outputs)
    assert trace.has_times == (not text.startswith("num_"))


def test_failed_requests_of_burstgpt_are_left_out_and_counted(tmp_path: Path) -> None:
    failed = "20,ChatGPT,300,0,300,Conversation log\n"
    lines = BURST.splitlines(keepends=True)
    requests = read_trace(write(tmp_path, "".join([*lines[:2], failed, lines[2], failed]))).requests
    assert requests.num_failed == 2
    np.testing.assert_array_equal(requests.output_length, [18, 230])
    np.testing.assert_array_equal(requests.arrival_time, [0.0, 40.0])


def test_shared_blocks_of_a_trace_become_segments(tmp_path: Path) -> None:
    requests = read_trace(write(tmp_path, MOONCAKE)).requests
    np.testing.assert_array_equal(requests.segment_offset, [0, 2, 4])
    np.testing.assert_array_equal(requests.segment, [0, 1, 0, 1])
    np.testing.assert_array_equal(requests.segment_end, [512, 1024])
    ours = read_trace(write(tmp_path, OURS)).requests
    np.testing.assert_array_equal(ours.segment_end, [64])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the trace is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "the trace is empty"),
        (
            "TIMESTAMP,ContextToken,GeneratedTokens\n1,2,3\n",
            "trace:1: no column for input_length .*ContextTokens",
        ),
        ("Timestamp,Request tokens,Response tokens\n-1,2,3\n", "trace:2: the time must not be negative"),
        ("Timestamp,Request tokens,Response tokens\n3,2,3\n1,2,3\n", "trace:3: the time lies before"),
        ("Timestamp,Request tokens,Response tokens\n3,2,0\n4,2,0\n", "all 2 requests failed"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n3,2,0\n",
            "trace:2: output_length must be a whole number .* take out requests that failed",
        ),
        (
            "Timestamp,Request tokens,Response tokens\n3,x,3\n",
            "trace:2: input_length must be a number, not 'x'",
        ),
        ("Timestamp,Request tokens,Response tokens\n3,4\n", "trace:2: 2 values under 3 columns"),
        ("Timestamp,Request tokens,Response tokens\nmonday,4,3\n", "trace:2: 'monday' is no number"),
        ("Timestamp,Request tokens,Response tokens\nnan,4,3\n", "trace:2: the time must not be negative"),
        ('{"input_length": 3}\n', "trace:1: output_length is missing"),
        (
            '{"input_length": 3, "output_length": 2, "hash_id": []}\n',
            "unknown key 'hash_id'; did you mean 'hash_ids'",
        ),
        (
            '{"input_length": 3, "output_length": 2}\n{"timestamp": 1, "input_length": 3, "output_length": 2}\n',
            "trace:2",
        ),
        ('{"input_length": 3, "output_length": 2, "hash_ids": 1}\n', "hash_ids must be a list"),
        ('{"input_length": 3,\n', "trace:1: not JSON"),
        ('{"input_length": 3, "output_length": 1}\n[]\n', "trace:2: one request a line is an object"),
        (
            '{"input_length": 3, "output_length": 1, "prefix_group": 1, "prefix_length": 9}\n',
            "prefix_length must be",
        ),
        ('{"input_length": true, "output_length": 1}\n', "input_length must be a number"),
    ],
)
def test_bad_traces_are_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_trace(write(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")


def test_recorded_lengths_take_the_arrivals_of_the_workload(tmp_path: Path) -> None:
    path = str(write(tmp_path, "input_length,output_length\n10,20\n30,40\n"))
    assert load_requests(workload(requests_file=path)).arrival_time.min() > 0.0
    closed = load_requests(workload(arrival="closed_loop", concurrency=2, requests_file=path))
    assert closed.concurrency == 2
    with pytest.raises(SpecError, match="has lengths but no times"):
        load_requests(workload(arrival="trace", requests_file=path))
    replayed = load_requests(workload(arrival="trace", requests_file=str(write(tmp_path, AZURE))))
    assert replayed.num_requests == 2


def test_lengths_follow_their_distribution() -> None:
    generator = np.random.default_rng(0)
    assert set(sample_lengths(LengthDistribution(mean=70), 5, generator)) == {70}
    uniform = sample_lengths(
        LengthDistribution(mean=1000, kind="uniform_ratio", ratio=0.8), 20_000, generator
    )
    assert (uniform.min(), uniform.max()) == (800, 1000)
    assert uniform.mean() == pytest.approx(900, rel=0.01)
    normal = sample_lengths(
        LengthDistribution(mean=300, kind="lognormal", coefficient_of_variation=0.7), 100_000, generator
    )
    assert normal.mean() == pytest.approx(300, rel=0.01)
    assert normal.std() / normal.mean() == pytest.approx(0.7, rel=0.03)


@pytest.mark.parametrize(("arrival", "variation"), [("poisson", 1.0), ("gamma", 2.0)])
def test_arrivals_keep_their_rate_and_variation(arrival: str, variation: float) -> None:
    requests = generate_requests(
        workload(arrival=arrival, rate=5.0, burstiness=variation, num_requests=40_000), 1
    )
    gaps = np.diff(requests.arrival_time)
    assert gaps.mean() == pytest.approx(0.2, rel=0.04)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.06)


def test_equal_seeds_give_equal_requests() -> None:
    first, again, other = (generate_requests(workload(), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.input_length, again.input_length)
    np.testing.assert_array_equal(first.arrival_time, again.arrival_time)
    assert np.any(first.input_length != other.input_length)


def test_turns_of_a_session_hold_all_before_them() -> None:
    requests = generate_requests(
        workload(num_turns=3, num_requests=8, prefix_length=30, num_prefix_groups=2), 4
    )
    np.testing.assert_array_equal(requests.successor, [1, 2, -1, 4, 5, -1, 7, -1])
    np.testing.assert_array_equal(requests.roots, [0, 3, 6])
    total = requests.input_length + requests.output_length
    assert np.all(requests.input_length[[1, 2, 4, 5, 7]] > total[[0, 1, 3, 4, 6]])
    np.testing.assert_array_equal(np.diff(requests.segment_offset), [1, 2, 3, 1, 2, 3, 1, 2])
    for row in range(8):
        ends = requests.segment_end[
            requests.segment[requests.segment_offset[row] : requests.segment_offset[row + 1]]
        ]
        assert ends[0] == 30
        assert np.all(np.diff(ends) > 0)
        assert ends[-1] < requests.input_length[row]
    # What a turn leaves behind is what the next one begins with.
    np.testing.assert_array_equal(requests.final_segment[[0, 1]], requests.segment[[2, 5]])


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([(0.0, 0, 1)], {}, "input_length of request 0 must be at least 1"),
        ([(0.0, 1, 1), (-1.0, 1, 1)], {}, "not negative"),
        ([(2.0, 1, 1), (1.0, 1, 1)], {}, "request 1 comes before"),
        ([(float("nan"), 1, 1)], {}, "finite"),
        ([(0.0, 1, 1)], {"successor": np.array([1, 2])}, "successor must have 1 entries"),
        ([(0.0, 1, 1)], {"concurrency": -1}, "concurrency must not be below 0"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    rows: list[tuple[float, int, int]], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        table_of(*rows, **fields)
    empty = np.zeros(0, dtype=np.int64)
    with pytest.raises(SpecError, match="the table is empty"):
        RequestTable(arrival_time=np.zeros(0), input_length=empty, output_length=empty)
