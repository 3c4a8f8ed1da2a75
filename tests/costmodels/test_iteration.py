from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.costmodels.bound import iteration_time_bound
from meshwright.costmodels.context import CostContext
from meshwright.costmodels.iteration import iteration_costs
from meshwright.costmodels.memory import peak_memory
from meshwright.costmodels.micro_batch import micro_batch_times
from meshwright.costmodels.plan_columns import PlanColumns
from meshwright.costmodels.prediction import predict
from meshwright.costmodels.software import list_software
from meshwright.errors import SpecError
from meshwright.hardware_specs.specs import ClusterSpec
from meshwright.simcore.domain.plan import RECOMPUTES, ParallelPlan, partition_layers
from meshwright.simcore.training.iteration import iteration_time, simulate_iteration

MakeContext = Callable[..., CostContext]
MakePlan = Callable[..., ParallelPlan]
# Any-to-any NVLink, a mesh whose pairs own one link, PCIe without NVLink, one rack as one domain.
NODES = ["dgx-h100", "dgx-a100", "mi300x-8", "l40s-8", "gb200-nvl72"]


@dataclass(frozen=True)
class Case:
    """A plan and the job it runs."""

    context: CostContext
    plan: ParallelPlan

    @property
    def columns(self) -> PlanColumns:
        return PlanColumns.from_plans([self.plan], self.context.workload.global_batch_size)

    @property
    def bound(self) -> float:
        return float(iteration_time_bound(self.context, self.columns)[0])

    @property
    def seconds(self) -> float:
        return iteration_time(iteration_costs(self.context, self.plan), self.plan.schedule)


@st.composite
def cases(draw: st.DrawFn, make_context: MakeContext) -> Case:
    """Draw a job and a plan of the search space: gpipe, 1f1b and even interleaving, every other choice."""
    pp = draw(st.sampled_from([1, 2, 3, 4, 5, 8]))
    vpp = draw(st.sampled_from([1, 1, 2, 3])) if pp > 1 else 1
    num_layers = pp * vpp * draw(st.integers(1, 3))
    if vpp == 1:
        num_layers += draw(st.integers(0, pp - 1))
    tp, dp = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 3, 4, 16]))
    batches = pp * draw(st.integers(1, 3)) if vpp > 1 else draw(st.integers(1, 9))
    micro_batch_size = draw(st.sampled_from([1, 2, 4]))
    sharding = draw(st.sampled_from(["none", "zero1", "zero2", "zero3", "hsdp"])) if dp > 1 else "none"
    schedules = ["interleaved_1f1b"] if vpp > 1 else ["gpipe", "1f1b"]
    plan = ParallelPlan(
        dp=dp,
        tp=tp,
        pp=pp,
        vpp=vpp,
        sequence_parallel=tp > 1 and draw(st.booleans()),
        micro_batch_size=micro_batch_size,
        schedule="none" if pp == 1 else draw(st.sampled_from(schedules)),
        recompute=draw(st.sampled_from(RECOMPUTES)),
        sharding=sharding,  # type: ignore[arg-type]  # a word of the list above
        sharding_group=2 if sharding == "hsdp" and dp % 2 == 0 else None,
        layers_per_stage=partition_layers(num_layers, pp * vpp),
    )
    node = draw(st.sampled_from(NODES))
    per_node = 72 if node.endswith("72") else 8
    context = make_context(
        draw(st.sampled_from(["llama-3-8b", "gpt3-175b", "gemma-2-2b", "gpt2-xl"])),
        f"{node}:{-(-plan.num_gpus // per_node)}",
        batch=dp * micro_batch_size * batches,
        length=draw(st.sampled_from([512, 4096])),
        software=draw(st.sampled_from(list_software())),
        features=tuple(draw(st.sets(st.sampled_from(["eager", "async_tp", "no_overlap"])))),
        num_layers=num_layers,
    )
    return Case(context, plan)


def without_send_time(context: CostContext) -> CostContext:
    """Return a context whose links inside a node take no time."""
    link = replace(context.cluster.node.intra_link, bandwidth_bytes_per_second=1e30, latency=0.0)
    node = replace(context.cluster.node, gpu=replace(context.gpu, scale_up=link))
    return replace(context, cluster=replace(context.cluster, node=node))


@settings(max_examples=60)
@given(
    pp=st.sampled_from([1, 2, 3, 4, 8]),
    vpp=st.sampled_from([1, 2, 3]),
    groups=st.integers(1, 3),
    more=st.integers(0, 7),
    is_gpipe=st.booleans(),
    software=st.sampled_from(["megatron-2021", "megatron-2023", "torchtitan"]),
)
def test_the_bound_is_exact_for_equal_stages(
    make_context: MakeContext,
    make_plan: MakePlan,
    pp: int,
    vpp: int,
    groups: int,
    more: int,
    is_gpipe: bool,
    software: str,
) -> None:
    # A million layers per chunk beside a vocabulary of one token: embedding and head are nothing.
    vpp = vpp if pp > 1 else 1
    num_layers = pp * vpp * 10**6
    batches = groups * pp + (more if vpp == 1 else 0)
    made = make_context(batch=batches, num_layers=num_layers, vocab_size=1, software=software)
    schedule = "none" if pp == 1 else "interleaved_1f1b" if vpp > 1 else "gpipe" if is_gpipe else "1f1b"
    plan = make_plan(num_layers, pp=pp, vpp=vpp, schedule=schedule)
    case = Case(without_send_time(made), plan)
    assert case.bound == pytest.approx(case.seconds, rel=1e-6)


@settings(max_examples=40)
@given(data=st.data())
def test_one_plan_costs_what_its_row_among_many_costs(make_context: MakeContext, data: st.DataObject) -> None:
    case = data.draw(cases(make_context))
    batch = case.context.workload.global_batch_size
    other = replace(case.plan, recompute="full" if case.plan.recompute == "none" else "none")
    many = PlanColumns.from_plans([other, case.plan, other], batch)
    for score in (iteration_time_bound, peak_memory):
        assert score(case.context, many)[1] == score(case.context, case.columns)[0]
    alone, among = micro_batch_times(case.context, case.columns), micro_batch_times(case.context, many)
    for part in fields(alone):
        if part.name in ("layer", "dense_layer"):
            continue
        assert getattr(among, part.name)[1] == getattr(alone, part.name)[0], part.name
    for name in ("forward", "backward", "recompute", "weight_gradient", "forward_communication"):
        assert getattr(among.layer, name)[1] == getattr(alone.layer, name)[0], name


@settings(max_examples=40)
@given(data=st.data())
def test_costs_have_one_entry_per_virtual_stage_and_no_last_send(
    make_context: MakeContext, data: st.DataObject
) -> None:
    case = data.draw(cases(make_context))
    plan = case.plan
    costs = iteration_costs(case.context, plan)
    assert (costs.num_stages, costs.num_chunks) == (plan.pp, plan.vpp)
    assert costs.num_micro_batches == plan.num_micro_batches(case.context.workload.global_batch_size)
    for name in ("forward_time", "backward_time", "weight_gradient_time", "send_time"):
        assert getattr(costs, name).shape == (plan.pp * plan.vpp,)
    assert costs.optimizer_time.shape == (plan.pp,)
    assert costs.send_time[-1] == 0.0
    assert np.all(costs.forward_communication_time <= costs.forward_time)
    assert np.all(costs.backward_communication_time <= costs.backward_time)
    assert np.all(costs.weight_gradient_time < costs.backward_time)


@settings(max_examples=40)
@given(data=st.data(), which=st.sampled_from(["link", "nic", "memory"]), factor=st.floats(1.0, 10.0))
def test_more_bandwidth_is_never_slower(
    make_context: MakeContext, data: st.DataObject, which: str, factor: float
) -> None:
    case = data.draw(cases(make_context))
    faster = replace(case.context, cluster=with_bandwidth(case.context.cluster, which, factor))
    assert Case(faster, case.plan).seconds <= case.seconds * (1 + 1e-9)


def with_bandwidth(cluster: ClusterSpec, which: str, factor: float) -> ClusterSpec:
    """Return a cluster with the bandwidth of its GPU links, its NICs or its memory multiplied."""
    node, gpu = cluster.node, cluster.gpu
    if which == "nic":
        port = replace(node.nic, bandwidth_bytes_per_second=factor * node.nic.bandwidth_bytes_per_second)
        return replace(cluster, node=replace(node, nic=port))
    if which == "memory":
        bandwidth = factor * gpu.memory_bandwidth_bytes_per_second
        gpu = replace(gpu, memory_bandwidth_bytes_per_second=bandwidth)
    else:
        bandwidth = factor * node.intra_link.bandwidth_bytes_per_second
        link = replace(node.intra_link, bandwidth_bytes_per_second=bandwidth)
        gpu = replace(gpu, scale_up=link) if gpu.scale_up else replace(gpu, host_link=link)
    return replace(cluster, node=replace(node, gpu=gpu))


@pytest.mark.parametrize("pp", [1, 4])
@pytest.mark.parametrize("software", ["megatron-2023", "torchtitan", "llm-foundry-fsdp1"])
def test_twice_the_layers_take_twice_the_time(make_context: MakeContext, pp: int, software: str) -> None:
    # With a vocabulary of 1,000 the embedding and the head are below 1 % of 32 layers.
    seconds = []
    for num_layers in (32, 64):
        context = make_context(software=software, num_layers=num_layers, vocab_size=1000)
        context = replace(context, software=replace(context.software, fixed_time=0.0))
        plan = ParallelPlan(
            dp=8 // pp,
            pp=pp,
            micro_batch_size=1,
            schedule="none" if pp == 1 else "1f1b",
            layers_per_stage=partition_layers(num_layers, pp),
        )
        seconds.append(Case(context, plan).seconds)
    assert seconds[1] / seconds[0] == pytest.approx(2.0, rel=0.01)


def test_twice_the_micro_batches_take_the_time_twice_but_what_comes_once(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    plan = make_plan(dp=8, sharding="zero1")
    one, two, three = (Case(make_context(batch=8 * n), plan).seconds for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert two < 2 * one


def test_the_fixed_time_is_added_once(make_context: MakeContext, make_plan: MakePlan) -> None:
    context, plan = make_context(), make_plan(dp=2, tp=2, pp=2)
    slower = replace(
        context, software=replace(context.software, fixed_time=10.0 + context.software.fixed_time)
    )
    assert Case(slower, plan).seconds - Case(context, plan).seconds == pytest.approx(10.0)


def test_recompute_costs_time_in_the_order_of_what_it_runs_again(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context(software="megatron-2021")
    none, selective, full = (
        Case(context, make_plan(tp=8, recompute=word)).seconds for word in ("none", "selective", "full")
    )
    assert none < selective < full < 4 / 3 * none * 1.05


def test_a_tied_embedding_is_summed_between_first_and_last_stage(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    plan = make_plan(32, pp=4)
    tied, untied = (make_context(has_tied_embeddings=is_tied) for is_tied in (True, False))
    assert iteration_costs(tied, plan).fixed_time > iteration_costs(untied, plan).fixed_time
    alone = make_plan(32)
    assert iteration_costs(tied, alone).fixed_time == iteration_costs(untied, alone).fixed_time


def test_sharded_weights_are_gathered_on_every_micro_batch(
    make_context: MakeContext, make_plan: MakePlan
) -> None:
    context = make_context(software="torchtitan", cluster="dgx-h100:4")
    kept = iteration_costs(context, make_plan(dp=32, sharding="zero1"))
    gathered = iteration_costs(context, make_plan(dp=32, sharding="zero3"))
    assert gathered.forward_communication_time[0] > kept.forward_communication_time[0]
    assert gathered.parameter_gather_time[0] == gathered.gradient_reduce_time[0] == 0.0
    assert kept.parameter_gather_time[0] > 0.0


def test_a_batch_that_does_not_divide_is_refused(make_context: MakeContext, make_plan: MakePlan) -> None:
    with pytest.raises(SpecError, match="the nearest batches are 60 or 63"):
        iteration_costs(make_context(batch=61), make_plan(dp=3))


@settings(max_examples=20)
@given(data=st.data())
def test_a_prediction_is_its_simulation_with_figures_that_follow_from_it(
    make_context: MakeContext, data: st.DataObject
) -> None:
    case = data.draw(cases(make_context))
    context, plan = case.context, case.plan
    prediction = predict(context, plan)
    seconds = simulate_iteration(iteration_costs(context, plan), plan.schedule).iteration_time
    assert prediction.iteration_time == seconds
    tokens = context.workload.num_tokens
    assert prediction.tokens_per_second_per_gpu == pytest.approx(tokens / seconds / plan.num_gpus)
    assert 0.0 < prediction.mfu < 1.0
    assert prediction.mfu <= prediction.hfu
    assert prediction.memory_headroom == 1 - prediction.peak_memory_bytes / context.gpu.memory_bytes
    assert prediction.memory.total.argmax() == prediction.fullest_stage
