from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from schedule_shapes import DUAL, V_SHAPED

from meshwright.simcore.chrome_trace import write_chrome_trace
from meshwright.simcore.timeline import timeline_svg, timeline_text
from meshwright.simcore.training import IterationCosts, IterationResult, simulate_iteration

MakeCosts = Callable[..., IterationCosts]
SHAPES = [
    ("none", 1, 1, 4),
    ("1f1b", 4, 1, 8),
    ("interleaved_1f1b", 4, 2, 8),
    ("zb_h2", 4, 1, 8),
    ("zb_v", 4, 2, 8),
    ("v_half", 3, 2, 8),
    ("v_min", 4, 2, 8),
    ("dualpipe", 4, 2, 10),
    ("dualpipe_v", 3, 2, 9),
]


@pytest.fixture(params=SHAPES, ids=[shape[0] for shape in SHAPES])
def result(request: pytest.FixtureRequest, make_costs: MakeCosts) -> IterationResult:
    name, *size = request.param
    return simulate_iteration(make_costs(*size, rng=np.random.default_rng(3)), name)


def events_of(path: Path) -> list[dict[str, object]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def test_trace_slices_are_ordered_and_add_up_to_the_busy_time(
    result: IterationResult, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json.gz"
    summary = write_chrome_trace(result, path)
    events = events_of(path)
    assert (summary.num_events, summary.note) == (len(events), "")
    until: dict[tuple[int, int], float] = defaultdict(float)
    busy = np.zeros(result.operations.num_stages)
    for event in events:
        if event["ph"] == "X":
            track = event["pid"], event["tid"]
            assert event["ts"] >= until[track] - 1e-6
            until[track] = event["ts"] + event["dur"]
            busy[event["pid"]] += event["dur"] / 1e6 * (event["tid"] == 0)
    assert busy == pytest.approx(result.busy_time, abs=1e-6)


def test_every_arrow_of_a_trace_has_both_ends(result: IterationResult, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    write_chrome_trace(result, path)
    arrows: dict[str, dict[int, float]] = {"s": {}, "f": {}}
    for event in events_of(path):
        if event["ph"] in arrows:
            assert event["id"] not in arrows[event["ph"]]
            arrows[event["ph"]][event["id"]] = event["ts"]
    num_virtual = result.operations.placement.size
    # There and back between neighbours, but not at the turn: there either both are on one stage, or the second
    # copy of DualPipe's model begins, whose micro-batches are the other half.
    has_turn = result.schedule in (*V_SHAPED, *DUAL)
    batches = result.costs.num_micro_batches // result.operations.num_model_copies
    sends = 2 * (num_virtual - 1 - has_turn) * batches
    assert arrows["s"].keys() == arrows["f"].keys()
    assert len(arrows["s"]) == sends
    assert all(begin <= arrows["f"][number] for number, begin in arrows["s"].items())


def test_trace_counts_the_activations_in_flight(result: IterationResult, tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    write_chrome_trace(result, path)
    counts = defaultdict(list)
    for event in events_of(path):
        if event["ph"] == "C":
            counts[event["pid"]].append(event["args"]["chunks"])
    assert [max(counts[stage]) for stage in sorted(counts)] == result.peak_in_flight.tolist()
    assert all(values[-1] == 0 for values in counts.values())


def test_equal_results_give_equal_trace_bytes(result: IterationResult, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json.gz", "b.json.gz", "c.json")]
    for path in paths:
        write_chrome_trace(result, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert gzip.decompress(paths[0].read_bytes()) == paths[2].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths


def test_a_large_trace_holds_three_stages_and_says_so(make_costs: MakeCosts, tmp_path: Path) -> None:
    result = simulate_iteration(make_costs(8, 1, 16), "1f1b")
    summary = write_chrome_trace(result, tmp_path / "trace.json.gz", max_events=500)
    assert summary.stages == (0, 4, 7)
    assert "only stages 0, 4 and 7 of 8" in summary.note
    events = events_of(summary.path)
    assert {event["pid"] for event in events} == {0, 4, 7}
    arrows = [event["id"] for event in events if event["ph"] in "sf"]
    assert arrows == []


def test_text_chart_shows_the_schedule(make_costs: MakeCosts) -> None:
    # 33 s in 66 columns: two columns a second.
    text = timeline_text(simulate_iteration(make_costs(4, 1, 8), "1f1b"), width=66 + 15)
    lines = text.splitlines()
    assert lines[0].startswith("1f1b, 4 stages, 8 micro-batches: 33 s per iteration, bubble 27.3%")
    assert lines[1].startswith("stage 0 |F0F1F2F3" + 12 * "." + "B0==F4B1==")
    assert lines[4].startswith("stage 3 |......F0B0==F1B1==F2B2==")
    assert all(line.endswith(" 73%") for line in lines[1:5])


def test_charts_show_joint_pairs_as_one(make_costs: MakeCosts, tmp_path: Path) -> None:
    # 66 s: two columns a second.
    result = simulate_iteration(make_costs(8, 2, 20, 2.0, 4.0, 2.0), "dualpipe")
    text = timeline_text(result, width=132 + 15)
    assert text.splitlines()[1].startswith(
        "stage 0 |F0F1F2F3F4F5F6F-B=W~F-B=W~F-B=W~F-F7B13+......F14B0+F8B14+"
    )
    assert "B backward or input gradient" in text
    assert "& F and B at once" in text
    path = tmp_path / "trace.json.gz"
    write_chrome_trace(result, path)
    names = [event["name"] for event in events_of(path) if event["ph"] == "X" and event["pid"] == 0]
    assert names[:9] == [*(f"F m{batch} c0" for batch in range(7)), "F m10 c1", "B m10 c1"]
    assert names[17:19] == ["F m7 c0 & B m13 c1", "F m14 c1 & B m0 c0"]
    assert timeline_text(simulate_iteration(make_costs(4, 2, 8), "zb_v")).count("&") == 0
    wide = timeline_svg(simulate_iteration(make_costs(4, 2, 800), "dualpipe"))
    assert wide.count('Z"') == 3 * 4


def test_charts_of_any_width_are_aligned(result: IterationResult) -> None:
    for width in (1, 40, 77, 200):
        rows = [line for line in timeline_text(result, width).splitlines() if "|" in line]
        assert len(rows) == result.operations.num_stages
        assert {len(row) for row in rows} == {max(width, 40)}
        assert timeline_text(result, width).isascii()


def test_charts_of_many_stages_leave_out_the_middle(make_costs: MakeCosts) -> None:
    result = simulate_iteration(make_costs(70, 1, 70), "1f1b")
    lines = timeline_text(result).splitlines()
    assert lines[13].strip() == "..."
    assert "stage 69" in lines[25]
    assert timeline_svg(result).count(">stage ") == 64


def test_picture_is_well_formed_and_within_its_frame(result: IterationResult) -> None:
    picture = timeline_svg(result)
    root = ET.fromstring(picture)
    assert root.get("width") == "900"
    height = float(root.get("height") or 0)
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(box.get("x", 0)) <= float(box.get("x", 0)) + float(box.get("width", 0)) <= 900
        assert 0 <= float(box.get("y", 0)) <= float(box.get("y", 0)) + float(box.get("height", 0)) <= height
    texts = "".join(root.itertext())
    assert "forward" in texts
    assert "idle" in texts
    assert picture == timeline_svg(result)


def test_picture_of_narrow_operations_stays_small(make_costs: MakeCosts) -> None:
    picture = timeline_svg(simulate_iteration(make_costs(16, 4, 256), "interleaved_1f1b"))
    ET.fromstring(picture)
    assert len(picture) < 200_000
