"""Traces of serving runs for a viewer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from serving_deployments import LINK, behaviour, split_pools, step_table, workload

from meshwright.errors import SpecError
from meshwright.simcore.serving.requests import generate_requests
from meshwright.simcore.serving.simulate import simulate, simulate_pools
from meshwright.simcore.serving.timeline import step_kinds, write_serving_trace


def test_every_step_and_request_is_drawn(tmp_path: Path) -> None:
    requests = generate_requests(workload(num_requests=30), 2)
    run = simulate_pools(split_pools(behaviour(), behaviour()), requests, link=LINK, is_recording=True)
    summary = write_serving_trace(run, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert run.steps is not None
    assert (summary.num_events, summary.num_steps, summary.note) == (len(events), len(run.steps.end), "")
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices] == list(step_kinds(run.steps))
    assert {event["pid"] for event in slices} == {0, 1, 2}
    assert {event["name"] for event in slices if event["pid"] == 2} == {"decode"}
    assert sum(event["args"]["prompt_tokens"] for event in slices) == requests.input_length.sum()
    begins, ends = ([event for event in events if event["ph"] == kind] for kind in "be")
    assert len(begins) == len(ends)
    assert sum(event["name"].startswith("request ") for event in begins) == 30
    # Equal runs give equal bytes, also packed.
    for name in ("one.json.gz", "two.json.gz"):
        write_serving_trace(run, tmp_path / name)
    packed = (tmp_path / "one.json.gz").read_bytes()
    assert packed == (tmp_path / "two.json.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "trace.json").read_bytes()


def test_what_a_viewer_cannot_hold_is_left_out_and_said(tmp_path: Path) -> None:
    requests = generate_requests(workload(num_requests=30), 2)
    run = simulate(step_table(), behaviour(), requests, is_recording=True)
    summary = write_serving_trace(run, tmp_path / "trace.json", max_events=200)
    assert summary.num_events <= 204
    assert "steps were left out" in summary.note
    with pytest.raises(SpecError, match="kept no steps"):
        write_serving_trace(simulate(step_table(), behaviour(), requests), tmp_path / "none.json")
