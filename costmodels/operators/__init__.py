"""Operators: what each kind of kernel computes and moves, and the models that price it on a device."""

from __future__ import annotations

from meshwright.costmodels.operators.attention import (
    ATTENTION_BACKWARD,
    ATTENTION_DECODE,
    ATTENTION_PREFILL,
    MLA_DECODE,
    MLA_PREFILL,
)
from meshwright.costmodels.operators.base import DeviceRates, Operator, Parameter, Shape, Work, element_bytes
from meshwright.costmodels.operators.gemm import GEMM, GEMM_DGRAD, GEMM_WGRAD
from meshwright.costmodels.operators.model import OperatorError, OperatorModel, RooflineCurve, roofline_time
from meshwright.costmodels.operators.moe import MOE
from meshwright.costmodels.operators.residual import RbfResidual, Residual, StackedResidual
from meshwright.costmodels.operators.streaming import STREAMING
from meshwright.costmodels.operators.trees import TreeResidual

__all__ = [
    "OPERATORS",
    "STREAMING",
    "DeviceRates",
    "Operator",
    "OperatorError",
    "OperatorModel",
    "Parameter",
    "RbfResidual",
    "Residual",
    "RooflineCurve",
    "Shape",
    "StackedResidual",
    "TreeResidual",
    "Work",
    "element_bytes",
    "roofline_time",
]

OPERATORS: dict[str, Operator] = {
    "gemm": GEMM,
    "gemm_dgrad": GEMM_DGRAD,
    "gemm_wgrad": GEMM_WGRAD,
    "attention_prefill": ATTENTION_PREFILL,
    "attention_backward": ATTENTION_BACKWARD,
    "attention_decode": ATTENTION_DECODE,
    "mla_prefill": MLA_PREFILL,
    "mla_decode": MLA_DECODE,
    "moe": MOE,
    **STREAMING,
}
"""By name; a model in a calibration is named ``OPERATOR.PRECISION``."""
