"""Schedules with numbers of stages, chunks and micro-batches for which they exist."""

from __future__ import annotations

from hypothesis import strategies as st

from meshwright.simcore.schedules import SCHEDULES

V_SHAPED = ("zb_v", "v_half", "v_min")
DUAL = ("dualpipe", "dualpipe_v")


@st.composite
def shapes(draw: st.DrawFn, most_stages: int = 6, most_micro_batches: int = 20) -> tuple[str, int, int, int]:
    """A schedule and numbers of stages, chunks and micro-batches for which it exists."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    if name == "none":
        return name, 1, 1, draw(st.integers(1, most_micro_batches))
    if name == "interleaved_1f1b":
        stages = draw(st.integers(2, most_stages))
        return name, stages, draw(st.integers(2, 4)), stages * draw(st.integers(1, 4))
    if name == "dualpipe":
        stages = 2 * draw(st.integers(1, most_stages // 2))
        return name, stages, 2, 2 * (stages + draw(st.integers(0, most_micro_batches // 2)))
    stages = draw(st.integers(2 if name in (*V_SHAPED, *DUAL) else 1, most_stages))
    if name == "dualpipe_v":
        return name, stages, 2, 2 * stages + draw(st.integers(0, most_micro_batches))
    return name, stages, 2 if name in V_SHAPED else 1, draw(st.integers(1, most_micro_batches))
