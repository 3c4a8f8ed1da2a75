"""Routed experts: their work, their exchange, and what either costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.collectives import GroupPlacement, all_to_all_time, place_group
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.flops import hardware_flops, model_flops
from meshwright.costmodels.layers.cases import LayerCases
from meshwright.costmodels.layers.experts import expert_load, expert_times, routed_rows
from meshwright.costmodels.layers.layer import layer_times
from meshwright.costmodels.micro_batch import layers_backward, layers_forward, micro_batch_times
from meshwright.costmodels.parallelism.expert import (
    combine_time,
    dispatch_time,
    exposed_exchange_time,
    remote_copies,
)
from meshwright.costmodels.plan_columns import FloatColumn, PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.stage import leading_dense_layers
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.workload import ExpertRouting

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
Idealise = Callable[[CostContext], CostContext]
ROUTING = (
    ExpertRouting(ep=2, imbalance=1.125),
    ExpertRouting(ep=8, imbalance=1.25),
    ExpertRouting(ep=16, imbalance=1.5),
)
MOES = ["mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3", "gpt-oss-120b"]
# Scale-up links of several kinds, and a node whose GPUs reach each other over PCIe, slower than their NICs.
SCALE_UP_NODES = ["hgx-h800", "dgx-h100", "dgx-b200", "gb200-nvl72", "mi300x-8"]
NODES = [*SCALE_UP_NODES, "l40s-8"]


def column(*values: float) -> FloatColumn:
    return np.array(values, dtype=np.float64)


def cases(**changes: float) -> LayerCases:
    """Return one layer shape; keywords are its fields."""
    values = {
        name: column(float(changes.get(name, 1.0)))
        for name in ("tp", "cp", "ep", "etp", "expert_overlap", "micro_batch_size")
    }
    sp = np.array([changes.get("tp", 1.0) > 1.0])
    return LayerCases(**values, cp_method=np.zeros(1, dtype=np.int64), sequence_parallel=sp)


def with_workload(context: CostContext, **changes: object) -> CostContext:
    return replace(context, workload=replace(context.workload, **changes))  # type: ignore[arg-type]


def seconds(value: FloatColumn) -> float:
    assert value.shape == (1,)
    return float(value[0])


@pytest.mark.parametrize("name", [*MOES, "llama-3-8b", "gpt3-175b", "deepseek-v2-lite"])
def test_an_ideal_device_runs_the_model_flops(
    make_context: MakeContext, make_plan: MakePlan, idealise: Idealise, name: str
) -> None:
    # 1,024 tokens per expert and more: no tile is left partly empty.
    length = 16_384
    context = idealise(make_context(name, length=length, batch=1, kernel="flash_2", sliding_window=None))
    model = context.model
    plan = make_plan(model.num_layers)
    times = micro_batch_times(context, PlanColumns.from_plans([plan], 1))
    layers, leading = column(model.num_layers), column(leading_dense_layers(context))
    nothing = column(0.0)
    busy = layers_forward(times, layers, leading) + layers_backward(times, layers, leading, nothing)
    busy = busy + times.boundary_forward + times.boundary_backward
    work = seconds(busy) * context.gpu.peak("bf16")
    # Fused attention multiplies the scores once more in its backward (Dao 2023, section 3.2): 5 products, not 4.
    again = 0.5 * (
        model_flops(model, length, length, "full-attention") - model_flops(model, length, length, "causal")
    )
    assert work == pytest.approx(model_flops(model, length, length) + again / 3.0, rel=1e-9)


# Active parameters of the model cards, token table and LM head included where they say so.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("deepseek-v3", 37.0), ("mixtral-8x7b", 12.9), ("qwen3-235b-a22b", 22.0), ("gpt-oss-120b", 5.1)],
)
def test_short_sequences_take_six_flops_per_active_parameter(name: str, billions: float) -> None:
    model = replace(load_model(name), num_mtp_layers=0)
    assert model_flops(model, 1, 1) == pytest.approx(6e9 * billions, rel=0.025)


def test_deepseek_v3_takes_the_published_flops_per_token() -> None:
    # 2,048 H800 trained 272.80 billion tokens a day at 385 TFLOP/s (attention half) and 432 TFLOP/s (whole),
    # sequences of 4,096 (Zhao et al. 2025, arXiv 2505.09343, table 4); without the prediction module.
    model = replace(load_model("deepseek-v3"), num_mtp_layers=0)
    tokens_per_second = 272.80e9 / 86_400 / 2_048
    for convention, published in (("causal", 385e12), ("full-attention", 432e12)):
        achieved = model_flops(model, 1, 4096, convention) * tokens_per_second
        assert achieved == pytest.approx(published, rel=0.005)


def test_a_prediction_module_counts_as_a_layer_a_projection_and_a_head() -> None:
    model = load_model("deepseek-v3")
    without = replace(model, num_mtp_layers=0)
    assert model.moe is not None
    one_layer = replace(without, num_layers=without.num_layers + 1)
    layer = model_flops(one_layer, 1, 4096) - model_flops(without, 1, 4096)
    projection_and_head = 6.0 * model.hidden_size * (2 * model.hidden_size + model.vocab_size)
    module = model_flops(model, 1, 4096) - model_flops(without, 1, 4096)
    assert module == pytest.approx(layer + projection_and_head, rel=1e-12)


def test_recomputing_modules_adds_their_flops() -> None:
    model, length = replace(load_model("deepseek-v3"), num_mtp_layers=0), 4096

    def added(*modules: str) -> float:
        none = hardware_flops(model, 1, length, "none")
        return hardware_flops(model, 1, length, "selective", recompute_modules=modules) - none

    assert added("layernorm") == added("moe_act") == 0.0
    assert added("core_attn") == pytest.approx(
        hardware_flops(model, 1, length, "selective") - hardware_flops(model, 1, length, "none")
    )
    # q: 1,536 x 128 x 192; k and v: 512 x 128 x 256; two FLOPs each in 61 layers.
    assert added("mla_up_proj") == pytest.approx(2 * 61 * 128 * (1536 * 192 + 512 * 256))
    # The block holds the shared experts: naming both is naming it.
    assert added("moe", "shared_experts") == added("moe") > added("shared_experts") > 0.0
    everything = added("core_attn", "mla_up_proj", "mlp", "moe")
    full = hardware_flops(model, 1, length, "full") - hardware_flops(model, 1, length, "none")
    assert everything < full


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-235b-a22b", "deepseek-v3"])
def test_expert_work_does_not_depend_on_the_grid(
    make_context: MakeContext, idealise: Idealise, name: str
) -> None:
    context = idealise(make_context(name, length=16_384))
    grids = [(1, 1), (8, 1), (1, 4), (4, 2), (2, 4)]
    times = [expert_times(context, cases(ep=ep, etp=etp)) for ep, etp in grids]
    for part in ("forward", "backward", "weight_gradient", "expert_forward", "expert_backward"):
        values = [seconds(getattr(each, part)) for each in times]
        assert values == pytest.approx([values[0]] * len(values), rel=1e-12), part


def test_ranks_together_compute_every_row_once(make_context: MakeContext) -> None:
    context = make_context("mixtral-8x7b", length=8192)
    moe = context.model.moe
    assert moe is not None
    for tp, cp, ep, etp in ((1, 1, 8, 1), (4, 1, 8, 1), (2, 2, 4, 2), (8, 1, 8, 8)):
        case = cases(tp=tp, cp=cp, ep=ep, etp=etp)
        # Of one micro-batch over tp x cp ranks: 8,192 tokens, two experts each.
        assert seconds(routed_rows(context, case, moe)) * tp * cp == 8192 * 2


def test_a_narrower_expert_fills_its_tiles_worse(make_context: MakeContext) -> None:
    # 512 rows over 128 experts are 4 of the 128 rows of a tile each; over 8 experts they are 64.
    context = make_context("mixtral-8x7b", length=512, batch=1)
    moe = context.model.moe
    assert moe is not None
    narrow = replace(moe, num_experts=128, top_k=1)
    wide = replace(moe, num_experts=8, top_k=1)
    slow, fast = (
        expert_times(replace(context, model=replace(context.model, moe=spec)), cases())
        for spec in (narrow, wide)
    )
    assert seconds(slow.expert_forward) > 1.5 * seconds(fast.expert_forward)


@given(imbalance=st.floats(1.0, 20.0), ep=st.sampled_from([1, 2, 8, 64]))
def test_the_most_loaded_rank_has_the_imbalance_but_never_more_than_all(
    make_context: MakeContext, imbalance: float, ep: int
) -> None:
    context = with_workload(make_context("deepseek-v3"), routing_imbalance=imbalance)
    load = seconds(expert_load(context, cases(ep=ep)))
    assert load == (1.0 if ep == 1 else min(imbalance, ep))
    # Buffers filled or padded to a capacity are as full everywhere.
    padded = with_workload(context, expert_capacity_factor=1.25)
    assert seconds(expert_load(padded, cases(ep=ep))) == 1.25


def test_every_ep_has_its_own_imbalance(make_context: MakeContext) -> None:
    context = with_workload(make_context("deepseek-v3"), routing_by_ep=ROUTING)
    columns = replace(cases(), ep=column(16, 1, 2, 8, 4, 256))
    # 4 is not stated: the next larger one counts; nor is anything past 16.
    assert expert_load(context, columns).tolist() == [1.5, 1.0, 1.125, 1.25, 1.25, 1.5]


def test_an_ep_may_have_a_capacity_of_its_own(make_context: MakeContext) -> None:
    table = (*ROUTING[:-1], replace(ROUTING[-1], capacity_factor=1.1))
    context = with_workload(make_context("deepseek-v3"), routing_by_ep=table)
    columns = replace(cases(), ep=column(16, 1, 8, 256))
    assert expert_load(context, columns).tolist() == [1.1, 1.0, 1.25, 1.5]
    for_all = with_workload(context, expert_capacity_factor=2.0)
    assert expert_load(for_all, columns).tolist() == [2.0] * 4


def test_every_chunk_pays_for_latency_tiles_and_weights(make_context: MakeContext) -> None:
    few, many = (make_context("deepseek-v3", "dgx-h100:2", length=length) for length in (512, 65_536))
    for price in (dispatch_time, combine_time):
        more, less = (seconds(price(few, cases(ep=16, expert_overlap=each))) for each in (4, 1))
        assert less + 3.0 * few.cluster.fabric.latency < more < 4.0 * less
        # Of long messages the chunks take what the whole takes.
        more, less = (seconds(price(many, cases(ep=16, expert_overlap=each))) for each in (4, 1))
        assert less < more < 1.05 * less
    for context, least, most in ((few, 1.5, 4.0), (many, 1.0, 1.2)):
        more, less = (
            seconds(expert_times(context, cases(ep=16, expert_overlap=each)).expert_forward)
            for each in (4, 1)
        )
        assert least * less < more < most * less


def test_an_ep_costs_what_its_imbalance_stated_alone_costs(make_context: MakeContext) -> None:
    uniform = make_context("deepseek-v3", "dgx-h100:4")
    by_ep = with_workload(uniform, routing_by_ep=ROUTING[:2])
    for each in ROUTING[:2]:
        shape = cases(ep=each.ep)
        alone = with_workload(uniform, routing_imbalance=each.imbalance)
        for price in (dispatch_time, combine_time):
            assert price(by_ep, shape) == price(alone, shape) > price(uniform, shape)
        assert expert_times(by_ep, shape).forward == expert_times(alone, shape).forward


def test_a_placement_that_keeps_tokens_near_shortens_the_deduplicated_exchange(
    make_context: MakeContext,
) -> None:
    context = make_context("deepseek-v3", "dgx-h100:8")
    copies = seconds(remote_copies(context.model.moe, place_group(column(64), column(1), 8)))

    def priced(remote: float | None, etp: float = 1.0, *, features: frozenset[str]) -> float:
        entry = ExpertRouting(ep=64, imbalance=1.0, remote_nodes_per_token=remote)
        routed = with_workload(replace(context, features=features), routing_by_ep=(entry,))
        return seconds(combine_time(routed, cases(ep=64, etp=etp)))

    once = frozenset({"deepep"})
    assert priced(0.5 * copies, features=once) < priced(None, features=once)
    assert priced(copies, features=once) == pytest.approx(priced(None, features=once), rel=1e-12)
    # Ranks that are not side by side, and engines that send every pair, have nothing of it.
    assert priced(0.5 * copies, 2.0, features=once) == priced(None, 2.0, features=once)
    assert priced(0.5 * copies, features=frozenset()) == priced(None, features=frozenset())


def test_imbalance_and_capacity_stretch_the_experts(make_context: MakeContext, idealise: Idealise) -> None:
    context = idealise(make_context("deepseek-v3", length=16_384))
    even = seconds(expert_times(context, cases(ep=8)).expert_forward)
    for changed in ({"routing_imbalance": 1.5}, {"expert_capacity_factor": 1.5}):
        uneven = expert_times(with_workload(context, **changed), cases(ep=8))
        assert seconds(uneven.expert_forward) == pytest.approx(1.5 * even, rel=1e-12)


def test_the_router_computes_in_16_bits(make_context: MakeContext, idealise: Idealise) -> None:
    # Narrow formats multiply twice as fast on an ideal H100; the router does not (DeepSeek-V3, section 3.3.1).
    wide, narrow = (
        idealise(make_context("deepseek-v3", length=16_384, precision=word)) for word in ("bf16", "fp8")
    )
    model = wide.model
    assert model.moe is not None
    router = 2.0 * 16_384 * model.hidden_size * model.moe.num_experts / wide.gpu.peak("bf16")
    rest = [seconds(expert_times(context, cases(ep=8)).forward) - router for context in (wide, narrow)]
    ratio = wide.gpu.peak("fp8") / wide.gpu.peak("bf16")
    assert rest[0] / rest[1] == pytest.approx(ratio, rel=1e-9)


# The exchange.


@settings(max_examples=60)
@given(
    node=st.sampled_from(NODES),
    size=st.sampled_from([2, 4, 8, 16, 64]),
    num_bytes=st.floats(1e3, 1e10),
    factor=st.floats(1.0, 100.0),
)
def test_all_to_all_grows_with_bytes_and_never_beats_its_nic(
    make_context: MakeContext, node: str, size: int, num_bytes: float, factor: float
) -> None:
    context = make_context("deepseek-v3", f"{node}:64")
    cluster = context.cluster
    group = place_group(column(size), column(1), cluster.node.num_gpus)

    def timed(value: float, where: GroupPlacement = group) -> float:
        return seconds(all_to_all_time(column(value), where, cluster, context.calibration, 0.8))

    assert timed(factor * num_bytes) >= timed(num_bytes) * (1 - 1e-12)
    assert timed(num_bytes, place_group(column(1), column(1), 8)) == 0.0
    local = float(group.ranks_per_node[0])
    nic = cluster.node.nic_bandwidth_per_gpu * 0.8 / cluster.fabric.oversubscription
    assert timed(num_bytes) >= num_bytes * (size - local) / size / nic


@settings(max_examples=40)
@given(node=st.sampled_from(SCALE_UP_NODES), num_bytes=st.floats(1e6, 1e10))
def test_all_to_all_over_more_nodes_is_never_faster(
    make_context: MakeContext, node: str, num_bytes: float
) -> None:
    context = make_context("deepseek-v3", f"{node}:64")
    cluster = context.cluster
    per_node = cluster.node.num_gpus
    times = [
        seconds(
            all_to_all_time(
                column(num_bytes),
                place_group(column(per_node * count), column(1), per_node),
                cluster,
                context.calibration,
                0.8,
            )
        )
        for count in (2, 3, 4, 8, 16)
    ]
    assert times == sorted(times)


@settings(max_examples=60)
@given(
    node=st.sampled_from(NODES),
    name=st.sampled_from(MOES),
    ep=st.sampled_from([1, 2, 4, 8, 16, 32]),
    etp=st.sampled_from([1, 2]),
    length=st.sampled_from([128, 4096, 32_768]),
    precision=st.sampled_from(["bf16", "fp8"]),
)
def test_sending_a_token_once_never_costs_more(
    make_context: MakeContext, node: str, name: str, ep: int, etp: int, length: int, precision: str
) -> None:
    if node == "hgx-h800" and precision == "fp8":
        precision = "fp8_block"
    plain = make_context(name, f"{node}:16", length=length, precision=precision)
    once = replace(plain, features=frozenset({"deepep"}))
    case = cases(ep=ep, etp=etp)
    for timed in (dispatch_time, combine_time):
        assert seconds(timed(once, case)) <= seconds(timed(plain, case))
    assert seconds(dispatch_time(once, case)) <= seconds(combine_time(once, case))
    if ep * etp == 1:
        assert seconds(dispatch_time(plain, case)) == 0.0


def test_fp8_dispatch_sends_half_and_its_scales(make_context: MakeContext) -> None:
    # One byte and an fp32 scale per 128 elements against two bytes; large enough for latencies not to count.
    context = make_context(
        "deepseek-v3", "hgx-h800:64", length=1_000_000, precision="fp8", features=("deepep",)
    )
    for ep in (8, 64):
        dispatch, combine = dispatch_time(context, cases(ep=ep)), combine_time(context, cases(ep=ep))
        assert seconds(dispatch) / seconds(combine) == pytest.approx((1 + 4 / 128) / 2, rel=0.02)
    bf16 = make_context("deepseek-v3", "hgx-h800:64", features=("deepep",))
    plain = make_context("deepseek-v3", "hgx-h800:64", precision="fp8")
    for other in (bf16, plain):
        assert seconds(dispatch_time(other, cases(ep=64))) == seconds(combine_time(other, cases(ep=64)))


# DeepEP on H800 (docs/legacy.md, "Normal kernels"): 4,096 tokens, 7,168 wide, 4 of 8 groups, 8 experts; GB/s of what
# one rank receives over NVLink, and sends to nodes, its own among them.
@pytest.mark.parametrize(
    ("ep", "dispatch", "combine", "tolerance"),
    [(8, 153e9, 158e9, 0.1), (16, 43e9, 43e9, 0.3), (32, 58e9, 57e9, 0.15), (64, 51e9, 50e9, 0.15)],
)
def test_deduplicated_exchange_takes_what_deepep_measured(
    make_context: MakeContext, ep: int, dispatch: float, combine: float, tolerance: float
) -> None:
    context = make_context(
        "deepseek-v3", "hgx-h800:8", length=4096, precision="fp8_block", features=("deepep",)
    )
    case = cases(ep=ep)
    places = ep if ep == 8 else ep // 8
    group = GroupPlacement(size=column(places), ranks_per_node=column(1))
    moe = context.model.moe
    assert moe is not None
    # A token is counted once per place, those on its own included.
    copies = seconds(remote_copies(moe, group)) * places / (places - 1)
    elements = 4096 * 7168 * copies
    assert seconds(dispatch_time(context, case)) == pytest.approx(
        elements * (1 + 4 / 128) / dispatch, rel=tolerance
    )
    assert seconds(combine_time(context, case)) == pytest.approx(elements * 2 / combine, rel=tolerance)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_copies_per_token_are_the_expected_distinct_nodes(nodes: int) -> None:
    moe = load_model("mixtral-8x7b").moe
    assert moe is not None
    group = GroupPlacement(size=column(8.0 * nodes), ranks_per_node=column(8.0))
    # Two independent choices: N (1 - (1 - 1/N)^2) = 2 - 1/N distinct nodes.
    expected = (2 - 1 / nodes) * (nodes - 1) / nodes
    assert seconds(remote_copies(moe, group)) == pytest.approx(expected)


def test_group_limited_routing_bounds_the_nodes_a_token_reaches() -> None:
    moe = load_model("deepseek-v3").moe
    assert moe is not None
    for nodes in (2, 4, 8):
        # 4 of 8 groups, 8/N on each node: N (1 - C(8 - 8/N, 4) / C(8, 4)).
        missed = Fraction(comb(8 - 8 // nodes, 4), comb(8, 4))
        reachable = float(nodes * (1 - missed))
        expected = reachable * (1 - (1 - 1 / reachable) ** 8) * (nodes - 1) / nodes
        group = GroupPlacement(size=column(8.0 * nodes), ranks_per_node=column(8.0))
        assert seconds(remote_copies(moe, group)) == pytest.approx(expected)
    # "At most four nodes" (DeepSeek-V3, section 2.1.2).
    many = GroupPlacement(size=column(64.0), ranks_per_node=column(8.0))
    assert seconds(remote_copies(moe, many)) <= 4.0


@given(
    exchange=st.floats(1e-6, 1.0),
    compute=st.floats(1e-6, 1.0),
    degree=st.integers(2, 16),
)
def test_overlap_hides_part_of_the_exchange_and_never_more(
    make_context: MakeContext, exchange: float, compute: float, degree: int
) -> None:
    made = make_context("deepseek-v3")
    context = replace(made, software=replace(made.software, expert_overlap_contention=0.0))
    launch = context.calibration.gemm_curve("bf16").launch_time

    def exposed(chunks: int, where: CostContext = context) -> float:
        case = cases(ep=8, expert_overlap=chunks)
        return seconds(exposed_exchange_time(where, case, column(exchange), column(compute)))

    assert exposed(1) == exchange
    chunked = exposed(degree) - (degree - 1) * launch
    # A flow shop of d chunks: no faster than its busier machine, no slower than one after the other.
    assert max(0.0, exchange - compute) - 1e-12 <= chunked <= exchange + 1e-12
    assert exposed(degree, made) >= exposed(degree)
    alone = exposed_exchange_time(context, cases(), column(exchange), column(compute))
    assert seconds(alone) == 0.0


def test_a_shared_expert_adds_its_products_and_its_tensor_parallel_pair(make_context: MakeContext) -> None:
    context = make_context("deepseek-v3", length=4096)
    moe = context.model.moe
    assert moe is not None
    without = replace(context, model=replace(context.model, moe=replace(moe, shared_ffn_hidden_size=0)))
    case = cases(tp=4, ep=8)
    shared, alone = (layer_times(each, case, is_moe=True) for each in (context, without))
    assert seconds(shared.forward) > seconds(alone.forward)
    assert seconds(shared.forward_axes["tp"]) > seconds(alone.forward_axes["tp"]) > 0.0
    assert seconds(shared.forward_axes["ep"]) == seconds(alone.forward_axes["ep"])


# Milliseconds of an iteration on 8 B200, 32 micro-batches of 4,096 tokens per pipeline (SimuMax v1.2, docs/b200):
# layers, degrees, time.
@dataclass(frozen=True)
class MeasuredOnB200:
    model: str
    num_layers: int
    degrees: dict[str, int]
    milliseconds: float


DENSE_RUNS = [
    MeasuredOnB200("llama-3-70b", 12, {"tp": 2}, 5376.5),
    MeasuredOnB200("llama-3-70b", 12, {"pp": 2}, 5436.5),
]
MOE_RUNS = [
    MeasuredOnB200("deepseek-v2", 4, {"ep": 8}, 2721.3),
    MeasuredOnB200("deepseek-v2", 4, {"pp": 2, "ep": 4}, 1727.7),
    MeasuredOnB200("deepseek-v3", 4, {"ep": 8}, 4141.2),
    MeasuredOnB200("deepseek-v3", 4, {"pp": 2, "ep": 4}, 2718.6),
]


def predicted_over_measured(make_context: MakeContext, make_plan: MakePlan, run: MeasuredOnB200) -> float:
    dp = 8 // (run.degrees.get("tp", 1) * run.degrees.get("pp", 1))
    moe = load_model(run.model).moe
    # The first layer is dense, buffers are padded to a capacity of 1, communication does not overlap.
    cut = None if moe is None else replace(moe, num_dense_layers=1)
    context = make_context(
        run.model,
        "dgx-b200:1",
        batch=32 * dp,
        length=4096,
        features=("no_overlap",),
        num_layers=run.num_layers,
        num_mtp_layers=0,
        moe=cut,
    )
    if moe is not None:
        context = with_workload(context, expert_capacity_factor=1.0)
    plan = make_plan(
        run.num_layers, dp=dp, sharding="zero1", sequence_parallel="tp" in run.degrees, **run.degrees
    )
    result = predict(context, plan)
    return (result.iteration_time - context.software.fixed_time) / (run.milliseconds / 1e3)


def test_mixtures_err_as_dense_layers_do_on_the_same_machine(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    # Whatever the device's constants err by, router, permutation, grouped products and exchange add no error of theirs.
    dense, mixed = (
        [predicted_over_measured(make_context, make_plan, run) for run in runs]
        for runs in (DENSE_RUNS, MOE_RUNS)
    )
    level = sum(dense) / len(dense)
    assert [each / level for each in mixed] == pytest.approx([1.0] * len(mixed), abs=0.05)
