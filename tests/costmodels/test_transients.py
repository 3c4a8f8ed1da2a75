"""What one layer's backward holds: gathered sequences and the buffers of context parallelism."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import activation_parts
from meshwright.costmodels.layers.cases import cases_of
from meshwright.costmodels.layers.transients import backward_bytes
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.simcore.domain.plan import ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
# Llama 3 8B: hidden size, MLP size, heads, key/value heads, width of a head.
HIDDEN, FFN, HEADS, GROUPS, DIM = 4096, 14_336, 32, 8, 128
LENGTH = 2048


def held(context: CostContext, plan: ParallelPlan) -> float:
    columns = PlanColumns.from_plans([plan], context.workload.global_batch_size)
    return float(backward_bytes(context, cases_of(columns), is_moe=False)[0])


@pytest.mark.parametrize(
    ("software", "precision", "features", "gathered"),
    [
        # Input, output gradient and input gradient. torchtitan kept the input, has the input gradients of two products
        # and their sum's copy, and gathers the output gradient in the format of the products.
        ("megatron-core", "bf16", (), 2 + 2 + 2),
        ("torchtitan", "bf16", (), 2 + 3 * 2),
        ("torchtitan", "fp8", ("async_tp",), 1 + 2 * 2),
    ],
)
def test_sequence_parallelism_gathers_gradients_and_inputs_that_were_not_kept(
    make_context: MakeContext,
    make_plan: MakePlan,
    software: str,
    precision: str,
    features: tuple[str, ...],
    gathered: int,
) -> None:
    context = make_context(software=software, precision=precision, features=features)
    whole = held(context, make_plan(tp=8))
    split = held(context, make_plan(tp=8, sequence_parallel=True))
    # The residual's two gradients shrink to an eighth; the gathered ones are as long as the sequence.
    residual = 2 * 2 * LENGTH * HIDDEN
    assert split - whole == pytest.approx(residual / 8 - residual + gathered * LENGTH * HIDDEN)


def test_products_that_keep_what_they_gathered_store_the_whole_sequence(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    plan = make_plan(tp=8, sequence_parallel=True)
    columns = PlanColumns.from_plans([plan], 64)
    norms = [
        float(activation_parts(make_context(software=name), cases_of(columns), is_moe=False).layernorm[0])
        for name in ("megatron-core", "torchtitan")
    ]
    assert norms == [2 * 2 * LENGTH * HIDDEN / 8, 2 * 2 * LENGTH * HIDDEN]


@pytest.mark.parametrize(("software", "groups"), [("megatron-core", GROUPS), ("torchtitan", HEADS)])
def test_context_parallel_buffers_hold_the_blocks_a_method_moves(
    make_context: MakeContext, make_plan: MakePlan, software: str, groups: int
) -> None:
    context = make_context(software=software, length=4 * LENGTH)
    alone = held(make_context(software=software, length=LENGTH), make_plan())
    extra = {
        method: held(context, make_plan(cp=4, cp_method=method)) - alone
        for method in ("ring", "all_gather", "ulysses", "hierarchical")
    }
    block = 2 * LENGTH * groups * 2 * DIM
    # Two blocks and their gradients; keys and values of all ranks and their gradients; queries, keys, values, output.
    assert extra["ring"] == pytest.approx(4 * block)
    assert extra["all_gather"] == pytest.approx(2 * 4 * block)
    assert extra["ulysses"] == pytest.approx(block + 2 * LENGTH * HEADS * 2 * DIM)
    # Four ranks of one node swap heads, so that no ring is left.
    assert extra["hierarchical"] == pytest.approx(extra["ulysses"])


def test_a_pipeline_that_keeps_unsharded_weights_holds_them_and_their_gradients(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    plan = make_plan(dp=4, pp=2, sharding="zero3")
    kept, resharded = (
        plan_memory(make_context(cluster="dgx-h100:1", software=name), plan).working_set[0]
        for name in ("torchtitan", "megatron-core")
    )
    context = make_context(software="torchtitan")
    layer, embedding = context.model.num_layer_parameters, context.model.num_embedding_parameters
    # 16 layers and the embedding: 2 bytes of weights, 4 of gradients, and a layer's gradient before it is added.
    expected = 6.0 * (16 * layer + embedding) + 2.0 * layer + held(context, make_plan())
    assert kept == pytest.approx(expected, rel=1e-4)
    assert kept > resharded
