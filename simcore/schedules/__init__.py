"""Pipeline schedules, one file each; the keys are the words of plan files."""

from __future__ import annotations

from meshwright.simcore.schedules.base import (
    BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    NO_OPERATION,
    WEIGHT_GRADIENT,
    PipelineSchedule,
    StageOperations,
)
from meshwright.simcore.schedules.dualpipe import DualPipe
from meshwright.simcore.schedules.dualpipe_v import DualPipeV
from meshwright.simcore.schedules.gpipe import GPipe
from meshwright.simcore.schedules.interleaved import Interleaved
from meshwright.simcore.schedules.none import NoPipeline
from meshwright.simcore.schedules.one_f_one_b import OneForwardOneBackward
from meshwright.simcore.schedules.v_half import VHalf
from meshwright.simcore.schedules.v_min import VMin
from meshwright.simcore.schedules.zb_h1 import ZeroBubbleH1
from meshwright.simcore.schedules.zb_h2 import ZeroBubbleH2
from meshwright.simcore.schedules.zb_v import ZeroBubbleV

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT_GRADIENT",
    "NO_OPERATION",
    "SCHEDULES",
    "WEIGHT_GRADIENT",
    "PipelineSchedule",
    "StageOperations",
]

SCHEDULES: dict[str, PipelineSchedule] = {
    "none": NoPipeline(),
    "gpipe": GPipe(),
    "1f1b": OneForwardOneBackward(),
    "interleaved_1f1b": Interleaved(),
    "zb_h1": ZeroBubbleH1(),
    "zb_h2": ZeroBubbleH2(),
    "zb_v": ZeroBubbleV(),
    "v_half": VHalf(),
    "v_min": VMin(),
    "dualpipe": DualPipe(),
    "dualpipe_v": DualPipeV(),
}
