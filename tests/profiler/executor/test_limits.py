from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from tests.profiler.executor.layouts import ALIBI, DENSE, MIXTURE, SINKS, execution, layouts

from meshwright.profiler.executor.limits import unsupported
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.model import MlaSpec, ModelSpec, MoeSpec
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import TrainingWorkload

MLA = MlaSpec(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)


FIELDS = {
    field.name
    for each in (ModelSpec, MlaSpec, MoeSpec, ParallelPlan, TrainingWorkload)
    for field in dataclasses.fields(each)
}


def assert_helps(message: str) -> None:
    """A refusal begins with a field of model, plan or workload, and ends with what would run."""
    assert set(re.findall(r"[a-z_0-9]+", message)) & FIELDS, message
    assert re.search(r"[;:] .*\b(use|leave|set|run|runs|give|plan|nearest)\b", message), message


def test_what_the_tests_run_is_supported() -> None:
    assert not any(unsupported(each) for each in layouts().values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mla": MLA, "has_qk_norm": True}, "has_qk_norm is not built with mla"),
        ({"mla": MLA, "sliding_window": 16}, "sliding_window is not built with mla"),
        ({"num_mtp_layers": 1}, "multi-token"),
        ({"has_attention_output_gate": True}, "has_attention_output_gate True is not built"),
        ({"mla": MLA, "has_attention_sinks": True}, "has_attention_sinks is not built with mla"),
        ({"mla": MLA, "position_embedding": "alibi"}, "position_embedding alibi is not built with mla"),
        (
            {"position_embedding": "learned", "max_position_embeddings": 8},
            "exceeds max_position_embeddings 8",
        ),
        ({"norms_per_layer": 1}, "norms_per_layer 1 of a sequential layer is not built; use 2 or 4"),
    ],
)
def test_models_it_cannot_build_are_refused(changes: dict[str, Any], reason: str) -> None:
    (message,) = unsupported(execution(dataclasses.replace(DENSE, **changes)))
    assert reason in message
    assert_helps(message)


def test_a_window_longer_than_the_sequence_is_full_attention() -> None:
    windowed = dataclasses.replace(DENSE, sliding_window=16)
    assert not unsupported(execution(windowed, cp=2))
    (message,) = unsupported(execution(dataclasses.replace(DENSE, sliding_window=15), cp=2))
    assert "sliding_window 15 is not built for cp_method ring" in message


@pytest.mark.parametrize(
    ("model", "plan", "reason"),
    [
        (ALIBI, {"tp": 3}, "tp 3 does not divide ffn_hidden_size 64"),
        (DENSE, {"tp": 3}, "tp 3 does not divide num_query_groups 4; use one of 1, 2, 4, 8"),
        (DENSE, {"cp": 2, "length": 18}, "sequence_length 18 does not divide into 4 pieces"),
        (DENSE, {"cp": 2, "cp_method": "hierarchical"}, "hierarchical"),
        (SINKS, {"cp": 2}, "has_attention_sinks is not built for cp > 1"),
        (ALIBI, {"cp": 2}, "position_embedding alibi is not built for cp > 1"),
        (DENSE, {"cp": 8, "cp_method": "ulysses"}, "does not divide the 4 key/value heads"),
        (MIXTURE, {"dp": 3, "etp": 3}, "etp 3 does not divide moe_ffn_hidden_size 32"),
        (SINKS, {"dp": 2, "etp": 2}, "experts with biases need etp 1"),
        (MIXTURE, {"tp": 2}, "sequence_parallel is false"),
        (DENSE, {"dp": 2, "ep": 2}, "ep 2 splits experts, and the model has none"),
        (DENSE, {"vocab_parallel": "vocab_1"}, "vocab_parallel 'vocab_1' splits the vocabulary over stages"),
        (
            DENSE,
            {"pp": 2, "schedule": "zb_h1", "vocab_parallel": "interlaced"},
            "is run with schedule 1f1b and vpp 1, not with zb_h1",
        ),
        (DENSE, {"dp": 2, "sharding": "zero3", "parameter_offload": "nvme"}, "parameter_offload 'nvme'"),
        (DENSE, {"sharding": "zero3", "parameter_offload": "cpu"}, "weights that no other rank shares"),
        (
            MIXTURE,
            {"dp": 2, "ep": 2, "sharding": "zero3", "parameter_offload": "cpu"},
            "experts that no other rank shares",
        ),
        (
            DENSE,
            {"dp": 4, "sharding": "zero1", "sharding_group": 2},
            "sharding_group 2 is not run with zero1",
        ),
        (DENSE, {"pp": 2, "schedule": "dualpipe", "batch": 8, "dp": 2, "sharding": "zero3"}, "dualpipe"),
        (DENSE, {"pp": 2, "schedule": "dualpipe", "batch": 2}, "at least twice the 2 stages"),
        (DENSE, {"dp": 8}, "not a multiple of dp"),
        (
            DENSE,
            {"pp": 4, "schedule": "1f1b", "layers_per_stage": (2, 0, 1, 1)},
            "layers_per_stage leaves stage 1 no layer",
        ),
    ],
)
def test_layouts_it_cannot_run_are_refused(model: ModelSpec, plan: dict[str, Any], reason: str) -> None:
    messages = unsupported(execution(model, **plan))
    assert any(reason in message for message in messages)
    for message in messages:
        assert_helps(message)


@pytest.mark.parametrize("precision", ["fp16", "fp8", "mxfp8", "tf32"])
def test_precisions_it_cannot_run_are_refused(precision: Any) -> None:
    each: Execution = execution(DENSE)
    workload = dataclasses.replace(each.workload, precision=precision)
    (message,) = unsupported(dataclasses.replace(each, workload=workload))
    assert precision in message
    assert_helps(message)
