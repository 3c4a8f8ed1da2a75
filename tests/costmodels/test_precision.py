"""Narrow number formats: what gets faster, what does not, and what they keep in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from meshwright.costmodels.context import CostContext
from meshwright.costmodels.layers.activations import ActivationParts, activation_parts
from meshwright.costmodels.layers.attention import attention_times
from meshwright.costmodels.layers.boundary import boundary_times
from meshwright.costmodels.layers.cases import LayerCases, cases_of
from meshwright.costmodels.memory import plan_memory
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.errors import SpecError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.plan import ParallelPlan

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
NARROW = ["fp8", "fp8_block", "mxfp8", "nvfp4"]
# Bytes of an element with its scales: one per tensor or per 128, a byte per 32, a byte per 16.
WIDTHS = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "mxfp8": 33 / 32, "nvfp4": 9 / 16}


def case_of(context: CostContext, plan: ParallelPlan) -> LayerCases:
    return cases_of(PlanColumns.from_plans([plan], context.workload.global_batch_size))


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("name", ["llama-3-8b", "llama-3.1-405b", "mixtral-8x7b", "deepseek-v3"])
def test_narrow_formats_are_faster_but_not_by_their_peaks(
    make_context: MakeContext, make_plan: MakePlan, name: str, precision: str
) -> None:
    wide, narrow = (
        make_context(name, "dgx-b200:8", batch=64 * 16, length=4096, precision=word)
        for word in ("bf16", precision)
    )
    is_moe = wide.model.moe is not None
    plan = make_plan(wide.model.num_layers, dp=64, ep=8 if is_moe else 1, sharding="zero1")
    slow, fast = (predict(context, plan) for context in (wide, narrow))
    gain = slow.iteration_time / fast.iteration_time
    assert 1.0 < gain < wide.gpu.peak(precision) / wide.gpu.peak("bf16")
    # Against the peak of its own format a run looks worse.
    assert fast.mfu < slow.mfu


def test_narrower_formats_are_faster(make_context: MakeContext, make_plan: MakePlan) -> None:
    plan = make_plan(80, dp=8, tp=8, sequence_parallel=True)
    seconds = [
        predict(make_context("llama-3-70b", "dgx-b200:8", length=8192, precision=word), plan).iteration_time
        for word in ("bf16", "fp8", "nvfp4")
    ]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize("precision", NARROW)
def test_attention_and_head_stay_in_16_bits(
    make_context: MakeContext, make_plan: MakePlan, precision: str
) -> None:
    wide, narrow = (
        make_context("llama-3-70b", "dgx-b200:1", length=8192, precision=word) for word in ("bf16", precision)
    )
    case = case_of(wide, make_plan(80))
    for one, other in zip(attention_times(wide, case), attention_times(narrow, case), strict=True):
        assert one[0] == other[0]
    assert boundary_times(wide, case).head_forward[0] == boundary_times(narrow, case).head_forward[0]
    assert boundary_times(wide, case).head_backward[0] == boundary_times(narrow, case).head_backward[0]


@pytest.mark.parametrize("precision", ["bf16", *NARROW])
def test_inputs_of_products_and_copies_of_weights_are_kept_as_they_are_multiplied(
    make_context: MakeContext, make_plan: MakePlan, precision: str
) -> None:
    # Transformer Engine's documentation ("Performance considerations", measured): a 1,024 x 1,024 layer in fp8 holds
    # 2 MB of weights, 1 MB of them in fp8 and 1 MB of input, where one in bf16 holds 2 and 2.
    context = make_context("llama-3-8b", "dgx-b200:1", length=4096, precision=precision)
    width = WIDTHS[precision]
    parts = activation_parts(context, case_of(context, make_plan()), is_moe=False)
    h, f = 4096, 14_336
    assert parts.layernorm[0] == pytest.approx(4096 * width * 2 * h)
    assert parts.mlp[0] == pytest.approx(4096 * (2.0 * 2 * f + width * f))
    # Layer input, residual, queries, keys and values, and attention's output stay in 16 bits.
    attention = 4096 * 2.0 * (2 * h + 2 * 4096 + 2 * 1024)
    assert parts.layer_input[0] + parts.kept[0] == pytest.approx(attention)
    memory = plan_memory(context, make_plan(dp=8, sharding="zero1"))
    model = context.model
    layers = model.num_layers * model.num_layer_parameters
    copy = 0.0 if precision == "bf16" else width
    tables = model.num_embedding_parameters + model.num_head_parameters
    assert memory.weights[0] == pytest.approx(2.0 * (layers + tables) + copy * layers)
    # ZeRO-3 casts what it gathers, when it gathers it.
    sharded = plan_memory(context, make_plan(dp=8, sharding="zero3"))
    assert sharded.weights[0] == pytest.approx(4.0 * (layers + tables) / 8)


def test_routed_rows_are_kept_narrow_too(make_context: MakeContext, make_plan: MakePlan) -> None:
    def routed(precision: str) -> ActivationParts:
        context = make_context("mixtral-8x7b", "dgx-b200:1", length=4096, precision=precision)
        return activation_parts(context, case_of(context, make_plan()), is_moe=True)

    wide, narrow = routed("bf16"), routed("fp8")
    assert narrow.moe_act[0] == pytest.approx(wide.moe_act[0] / 2)
    # Half of input and activation; pre-activations stay.
    saved = 8192 * (4096 + 14_336)
    assert wide.moe[0] - narrow.moe[0] == pytest.approx(saved)


def test_software_that_casts_on_the_fly_keeps_16_bits(make_context: MakeContext, make_plan: MakePlan) -> None:
    plan = make_plan(dp=8, sharding="zero1")
    wide, narrow = (
        plan_memory(make_context("llama-3-8b", "dgx-h100:1", software="torchtitan", precision=word), plan)
        for word in ("bf16", "fp8")
    )
    assert np.array_equal(wide.total, narrow.total)


def test_short_micro_batches_need_more_memory_in_fp8(make_context: MakeContext, make_plan: MakePlan) -> None:
    # "Contrary to intuition, FP8 training does not always reduce memory" (same page): copies outweigh inputs.
    plan = make_plan(dp=8, sharding="zero1")
    for length, sign in ((1024, 1), (32_768, -1)):
        wide, narrow = (
            plan_memory(make_context("llama-3-8b", "dgx-b200:1", length=length, precision=word), plan).total[
                0
            ]
            for word in ("bf16", "fp8")
        )
        assert np.sign(narrow - wide) == sign


@pytest.mark.parametrize(
    ("cluster", "formats"),
    [
        ("dgx-b200:1", {"bf16", *NARROW}),
        ("gb200-nvl72:1", {"bf16", *NARROW}),
        ("dgx-h100:1", {"bf16", "fp8", "fp8_block"}),
        ("dgx-a100:1", {"bf16"}),
    ],
)
def test_a_format_needs_its_units(make_context: MakeContext, cluster: str, formats: set[str]) -> None:
    gpu = resolve_cluster(cluster).gpu
    for precision in ("bf16", *NARROW):
        if precision in formats:
            context = make_context("llama-3-8b", cluster, precision=precision)
            assert gpu.peak(precision) >= gpu.peak("bf16") > 0.0
            assert context.calibration.gemm(precision).rates.peak_flops_per_second > 0.0
        else:
            with pytest.raises(SpecError, match=f"no {precision.removesuffix('_block')}"):
                make_context("llama-3-8b", cluster, precision=precision)
