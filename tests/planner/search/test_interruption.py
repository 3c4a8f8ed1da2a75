from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from search_cases import make_request, run

from meshwright.errors import SpecError
from meshwright.planner.search import SearchResult, exhaustive, funnel
from meshwright.planner.space import SearchLimits


def clock(monkeypatch: pytest.MonkeyPatch, seconds_per_look: float) -> None:
    """Let every look at the clock of a search take some time."""
    now = itertools.count()
    fake = SimpleNamespace(monotonic=lambda: next(now) * seconds_per_look)
    monkeypatch.setattr(exhaustive, "time", fake)


def test_a_search_that_is_cut_says_what_it_left_and_how_much_better_that_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = make_request(batch=32)
    whole = run(request)
    assert whole.cut is None
    best = whole.ranked[0].prediction.iteration_time
    unscored = []
    for limit in (0.5, 6.0, 20.0):
        clock(monkeypatch, 1.0)
        result = run(replace(request, max_seconds=limit))
        assert result.cut is not None
        assert result.ranked
        assert result.num_candidates + result.cut.num_unscored == whole.num_candidates
        assert sum(result.rejections.values()) + result.num_feasible == result.num_candidates
        found = result.ranked[0].prediction.iteration_time
        assert best >= found * (1.0 - result.cut.gap) * (1 - 1e-9)
        assert result.is_certified == (result.cut.gap == 0.0)
        assert (
            f"{result.cut.num_unscored:,} of {whole.num_candidates:,} plans were not scored"
            in result.notes[0]
        )
        unscored.append(result.cut.num_unscored)
    assert unscored == sorted(unscored, reverse=True)
    assert unscored[0] > 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_search_without_time_is_refused(seconds: float) -> None:
    with pytest.raises(SpecError, match="must be above 0"):
        replace(make_request(), max_seconds=seconds)


def facts(result: SearchResult) -> list[object]:
    """Return all that a search decides."""
    return [
        [(entry.plan, entry.prediction.iteration_time, entry.bound) for entry in result.ranked],
        None if result.rival is None else result.rival.plan,
        [entry.plan for entry in result.front],
        (result.num_candidates, result.num_feasible, result.num_simulated, result.is_certified),
        result.rejections,
    ]


@pytest.mark.parametrize(
    "schedules", [("none", "1f1b", "interleaved_1f1b"), ("zb_v", "v_half", "dualpipe_v")]
)
def test_an_interrupted_search_continues_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedules: tuple[str, ...]
) -> None:
    limits = SearchLimits(allowed={"schedule": schedules})
    request = make_request(batch=32, num_layers=8, limits=limits, num_plans=5)
    request = replace(request, wants_front=True)
    whole = run(request)
    path = tmp_path / "state.json"
    result, num_runs = None, 0
    while result is None or result.cut is not None:
        # Every run gets further than the last, which it repeats.
        clock(monkeypatch, 1.0)
        result = run(replace(request, max_seconds=7.0 * (1 + num_runs), resume=path))
        num_runs += 1
        assert num_runs < 100
    assert num_runs > 2
    assert facts(result) == facts(whole)
    # And once more from the finished state.
    assert facts(run(replace(request, resume=path))) == facts(whole)


def test_a_search_that_dies_keeps_what_it_had_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = make_request(batch=32, num_layers=8, num_plans=5)
    whole = run(request)
    path = tmp_path / "state.json"
    monkeypatch.setattr(exhaustive, "_SAVE_EVERY", 0.0)
    pour = funnel.Funnel.pour
    left = iter(range(9))

    def dying(self: funnel.Funnel, *arguments: object) -> int:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return pour(self, *arguments)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(funnel.Funnel, "pour", dying)
    with pytest.raises(KeyboardInterrupt):
        run(replace(request, resume=path))
    assert len(json.loads(path.read_text())["done"]) == 9
    assert [name.name for name in tmp_path.iterdir()] == ["state.json"]
    monkeypatch.undo()
    assert facts(run(replace(request, resume=path))) == facts(whole)


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    request = make_request(num_layers=4, num_plans=1)
    run(replace(request, resume=path))
    before = path.read_bytes()
    others = (
        make_request(num_layers=5, num_plans=1),
        replace(request, objective="cost"),
        replace(request, limits=SearchLimits(memory_headroom=0.1)),
    )
    for other in others:
        with pytest.raises(SpecError, match="is the state of another search") as caught:
            run(replace(other, resume=path))
        assert caught.value.exit_code == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "is not the state of a search"),
        (b'{"written_by": "meshwright", "kind": "training_report"}', "is not the state of a search"),
        (b"[]", "is not the state of a search"),
    ],
)
def test_a_file_that_is_no_state_is_refused_and_kept(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "precious"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=message):
        run(replace(make_request(num_layers=4), resume=path))
    assert path.read_bytes() == content
