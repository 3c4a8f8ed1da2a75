from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tests.profiler.executor.layouts import ALIBI, DENSE, MIXTURE, SINKS, execution, layouts

from meshwright.profiler.executor.limits import unsupported
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.model import MlaSpec, ModelSpec

MLA = MlaSpec(q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8)


def test_what_the_tests_run_is_supported() -> None:
    assert not any(unsupported(each) for each in layouts().values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mla": MLA, "has_qk_norm": True}, "latent attention is not built with has_qk_norm"),
        ({"mla": MLA, "sliding_window": 16}, "latent attention is not built with a sliding window"),
        ({"num_mtp_layers": 1}, "multi-token"),
        ({"has_attention_output_gate": True}, "has_attention_output_gate True is not built"),
        ({"mla": MLA, "has_attention_sinks": True}, "latent attention is not built with has_attention_sinks"),
        ({"mla": MLA, "position_embedding": "alibi"}, "latent attention is not built with ALiBi"),
        ({"position_embedding": "learned", "max_position_embeddings": 8}, "8 learned positions"),
        ({"norms_per_layer": 1}, "1 norms in a sequential"),
    ],
)
def test_models_it_cannot_build_are_refused(changes: dict[str, Any], reason: str) -> None:
    (message,) = unsupported(execution(dataclasses.replace(DENSE, **changes)))
    assert reason in message


def test_a_window_longer_than_the_sequence_is_full_attention() -> None:
    windowed = dataclasses.replace(DENSE, sliding_window=16)
    assert not unsupported(execution(windowed, cp=2))
    (message,) = unsupported(execution(dataclasses.replace(DENSE, sliding_window=15), cp=2))
    assert "a sliding window of 15 is not built for cp_method ring" in message


@pytest.mark.parametrize(
    ("model", "plan", "reason"),
    [
        (ALIBI, {"tp": 3}, "tp 3 does not divide ffn_hidden_size 64"),
        (DENSE, {"tp": 3}, "tp 3 does not divide num_query_groups 4"),
        (DENSE, {"cp": 2, "length": 18}, "18 do not divide into 4 pieces"),
        (DENSE, {"cp": 2, "cp_method": "hierarchical"}, "hierarchical"),
        (SINKS, {"cp": 2}, "attention sinks are not built for cp > 1"),
        (ALIBI, {"cp": 2}, "ALiBi positions are not built for cp > 1"),
        (DENSE, {"cp": 8, "cp_method": "ulysses"}, "does not divide the 4 key/value heads"),
        (MIXTURE, {"dp": 3, "etp": 3}, "etp 3 does not divide moe_ffn_hidden_size 32"),
        (SINKS, {"dp": 2, "etp": 2}, "experts with biases need etp 1"),
        (MIXTURE, {"tp": 2}, "sequence parallelism"),
        (DENSE, {"dp": 2, "ep": 2}, "a model without experts"),
        (DENSE, {"pp": 2, "schedule": "1f1b", "vocab_parallel": "vocab_1"}, "vocab_1"),
        (DENSE, {"dp": 2, "sharding": "zero1", "optimizer_offload": "nvme"}, "optimizer_offload 'nvme'"),
        (DENSE, {"dp": 2, "sharding": "zero3", "parameter_offload": "cpu"}, "parameter_offload 'cpu'"),
        (DENSE, {"activation_offload": True}, "where recompute is full"),
        (DENSE, {"dp": 4, "sharding": "zero1", "sharding_group": 2}, "zero1 inside groups"),
        (DENSE, {"pp": 2, "schedule": "dualpipe", "batch": 8, "dp": 2, "sharding": "zero3"}, "dualpipe"),
        (DENSE, {"pp": 2, "schedule": "dualpipe", "batch": 2}, "at least twice the 2 stages"),
        (DENSE, {"dp": 8}, "not a multiple of dp"),
        (DENSE, {"pp": 4, "schedule": "1f1b", "layers_per_stage": (2, 0, 1, 1)}, "stage 1 holds no layer"),
    ],
)
def test_layouts_it_cannot_run_are_refused(model: ModelSpec, plan: dict[str, Any], reason: str) -> None:
    assert any(reason in message for message in unsupported(execution(model, **plan)))


@pytest.mark.parametrize("precision", ["fp16", "fp8", "mxfp8", "tf32"])
def test_precisions_it_cannot_run_are_refused(precision: Any) -> None:
    each: Execution = execution(DENSE)
    workload = dataclasses.replace(each.workload, precision=precision)
    (message,) = unsupported(dataclasses.replace(each, workload=workload))
    assert precision in message
