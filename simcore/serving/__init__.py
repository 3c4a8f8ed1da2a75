"""Serving simulated request by request: arrivals, scheduling, the KV cache and what users would measure."""

from __future__ import annotations

from meshwright.simcore.serving.behaviour import EngineBehaviour, TransferLink
from meshwright.simcore.serving.metrics import (
    RequestMetrics,
    ServingMetrics,
    request_metrics,
    slo_violations,
    summarize,
)
from meshwright.simcore.serving.pool import ReplicaPool
from meshwright.simcore.serving.requests import RequestTable, closed_loop_requests, generate_requests
from meshwright.simcore.serving.simulate import ServingResult, StepRecord, simulate, simulate_pools
from meshwright.simcore.serving.step_table import StepTable
from meshwright.simcore.serving.timeline import write_serving_trace
from meshwright.simcore.serving.traces import load_requests, read_trace

__all__ = [
    "EngineBehaviour",
    "ReplicaPool",
    "RequestMetrics",
    "RequestTable",
    "ServingMetrics",
    "ServingResult",
    "StepRecord",
    "StepTable",
    "TransferLink",
    "closed_loop_requests",
    "generate_requests",
    "load_requests",
    "read_trace",
    "request_metrics",
    "simulate",
    "simulate_pools",
    "slo_violations",
    "summarize",
    "write_serving_trace",
]
