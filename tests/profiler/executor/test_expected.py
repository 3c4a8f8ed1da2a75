from __future__ import annotations

import pytest
from tests.profiler.executor.layouts import (
    ALIBI,
    DENSE,
    LATENT,
    LATENT_LITE,
    MIXTURE,
    ODD,
    PARALLEL_BLOCK,
    SANDWICH,
    SINKS,
    execution,
)

from meshwright.profiler.executor.expected import expected_operations, expected_traffic
from meshwright.profiler.executor.local_tensors import local_tensors
from meshwright.profiler.executor.pipeline_order import PipelineOrder
from meshwright.simcore.domain.model import ModelSpec
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.schedules import BACKWARD, FORWARD


def held(model: ModelSpec, **plan: int) -> int:
    """Parameters of one rank without a pipeline."""
    layout = ParallelPlan(
        dp=plan.pop("dp", 1),
        micro_batch_size=1,
        schedule="none",
        layers_per_stage=(model.num_layers,),
        **plan,  # type: ignore[arg-type]
    )
    return sum(tensor.size for tensor in local_tensors(model, layout, PipelineOrder(layout, 1), 0))


@pytest.mark.parametrize(
    "model", [DENSE, ODD, MIXTURE, LATENT, LATENT_LITE, PARALLEL_BLOCK, SANDWICH, SINKS, ALIBI]
)
def test_one_rank_holds_every_parameter_of_the_model(model: ModelSpec) -> None:
    assert held(model) == model.num_parameters


@pytest.mark.parametrize("name", ["llama-3-70b", "mixtral-8x7b", "gpt-3-175b", "qwen2.5-7b", "deepseek-v2"])
def test_one_rank_holds_every_parameter_of_published_models(name: str) -> None:
    model = load_model(name)
    assert held(model) == model.num_parameters


def test_expert_parallel_ranks_share_the_experts_alone() -> None:
    experts = MIXTURE.num_moe_layers * 4 * MIXTURE.num_expert_parameters
    assert held(MIXTURE, dp=4, ep=4) == MIXTURE.num_parameters - experts + experts // 4


def test_a_pipeline_sends_each_activation_and_each_gradient_once() -> None:
    sent = expected_traffic(execution(DENSE, pp=2, schedule="1f1b", batch=4, length=16))
    # 4 micro-batches of 16 tokens, 32 wide, 4 bytes each.
    assert sent[0]["pp", "send"] == sent[1]["pp", "send"] == (4, 4 * 16 * 32 * 4)


def test_a_v_keeps_what_turns_on_its_last_stage() -> None:
    sent = expected_traffic(execution(DENSE, pp=2, vpp=2, schedule="zb_v", batch=4))
    # Stage 0 sends down forward and backward of chunk 1's gradient; stage 1 the same up: nothing at the turn.
    assert sent[0]["pp", "send"][0] == sent[1]["pp", "send"][0] == 8


def test_tensor_parallelism_sums_twice_per_layer_each_way() -> None:
    sent = expected_traffic(execution(DENSE, tp=2, batch=1, length=16))[0]
    activation = 16 * 32 * 4
    # 4 layers x 2 pairs x both ways, embedding forward, head backward; three sums of the loss.
    assert sent["tp", "all_reduce"] == (16 + 2 + 3, 18 * activation + 3 * 16 * 4)


def test_sequence_parallelism_gathers_and_scatters_instead() -> None:
    sent = expected_traffic(execution(DENSE, tp=2, sequence_parallel=True, batch=1, length=16))[0]
    activation = 16 * 32 * 4
    assert sent["tp", "all_gather"] == (18, 18 * activation // 2)
    assert sent["tp", "reduce_scatter"] == (18, 18 * activation)
    # The loss, and the gradients of 9 norms of 32 channels.
    assert sent["tp", "all_reduce"] == (4, 3 * 16 * 4 + 9 * 32 * 4)


def test_zero3_gathers_layers_twice_and_the_rest_once_per_micro_batch() -> None:
    sent = expected_traffic(execution(DENSE, dp=2, sharding="zero3", batch=4))[0]
    assert sent["dp", "all_gather"][0] == 2 * (4 * 2 + 1)
    assert sent["dp", "reduce_scatter"] == (2 * 5, 2 * 4 * DENSE.num_parameters)


def test_full_recompute_sends_the_forward_collectives_again() -> None:
    plain = expected_traffic(execution(DENSE, tp=2, batch=1))[0]["tp", "all_reduce"][0]
    again = expected_traffic(execution(DENSE, tp=2, batch=1, recompute="full"))[0]["tp", "all_reduce"][0]
    assert again - plain == 4 * 2


def test_operations_of_1f1b() -> None:
    first, last = expected_operations(execution(DENSE, pp=2, schedule="1f1b", batch=2))
    assert first == [(FORWARD, 0, 0), (FORWARD, 1, 0), (BACKWARD, 0, 0), (BACKWARD, 1, 0)]
    assert last == [(FORWARD, 0, 1), (BACKWARD, 0, 1), (FORWARD, 1, 1), (BACKWARD, 1, 1)]
