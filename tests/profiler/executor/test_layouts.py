"""Real training on CPU processes: every layout equals a single process, and sends exactly what was told beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.profiler.executor.layouts import STEPS, layouts, reference, run_layouts, served_layouts

from meshwright.profiler.executor.expected import expected_operations, expected_traffic, tells_activations
from meshwright.profiler.executor.local_tensors import has_experts
from meshwright.profiler.executor.rank_order import coordinates
from meshwright.profiler.executor.serving_run import NUM_DECODES
from meshwright.simcore.domain.execution import Execution
from meshwright.simcore.domain.rank_groups import RankGroup, rank_groups

LAYOUTS = layouts()
SERVED = served_layouts()
Results = dict[str, list[dict[str, Any]]]
# Back from the experts travels what the routing says: told for the group, not for each rank.
ROUTED = ("ep all_to_all", "etp all_to_all")


def reference_name(execution: Execution) -> str:
    workload = execution.workload
    return f"{hash(execution.model)}-{workload.global_batch_size}-{workload.precision}"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    references = {reference_name(each): reference(each) for each in LAYOUTS.values()}
    folder: Path = tmp_path_factory.mktemp("layouts")
    alone = {f"served_alone_{name}": reference(each) for name, each in SERVED.items()}
    return run_layouts({**LAYOUTS, **references, **SERVED, **alone}, folder)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradient_norm_equal_those_of_a_single_process(results: Results, name: str) -> None:
    single = results[reference_name(LAYOUTS[name])][0]
    # Sums of 16-bit products differ by their order.
    relative = 1e-2 if LAYOUTS[name].workload.precision == "bf16" else 1e-5
    for rank in results[name]:
        assert len(rank["losses"]) == STEPS
        assert rank["losses"] == pytest.approx(single["losses"], rel=relative, abs=0.0)
        assert rank["gradient_norms"] == pytest.approx(single["gradient_norms"], rel=relative, abs=0.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_and_messages_of_every_group_are_as_told(results: Results, name: str) -> None:
    execution = LAYOUTS[name]
    told = [
        {f"{axis} {operation}": list(each) for (axis, operation), each in rank.items()}
        for rank in expected_traffic(execution)
    ]
    for step in range(STEPS):
        sent = [dict(rank["traffic"][step]) for rank in results[name]]
        for counted, foreseen in zip(sent, told, strict=True):
            if execution.plan.activation_offload and not tells_activations(execution.plan):
                # Which tensors a layer keeps Torch's kernels decide: what has left comes back.
                left, back = (counted.pop(f"activations {way}_host") for way in ("to", "from"))
                assert left == back
                assert left[0] > 4
            assert _without_routed(counted) == _without_routed(foreseen)
        assert _routed_sum(sent) == _routed_sum(told)


@pytest.mark.parametrize("name", LAYOUTS)
def test_operations_run_in_the_order_of_the_schedule(results: Results, name: str) -> None:
    execution = LAYOUTS[name]
    told = expected_operations(execution)
    for number, rank in enumerate(results[name]):
        stage = coordinates(execution.plan, number).pp
        assert [tuple(operation) for operation in rank["operations"]] == told[stage]


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_are_those_of_the_simulator(results: Results, name: str) -> None:
    plan = LAYOUTS[name].plan
    groups: tuple[RankGroup, ...] = ("tp", "cp", "ep", "etp", "dp_cp", "edp", "pp")
    for group in groups:
        foreseen = rank_groups(plan, group).tolist()
        for number, rank in enumerate(results[name]):
            assert rank["groups"][group] in foreseen
            assert number in rank["groups"][group]


@pytest.mark.parametrize("name", SERVED)
def test_a_replica_says_what_one_rank_says(results: Results, name: str) -> None:
    plan = SERVED[name].plan
    (alone,) = results[f"served_alone_{name}"]
    for number, rank in enumerate(results[name]):
        at = coordinates(plan, number)
        if at.pp in (0, plan.pp - 1):
            first = at.dp * plan.micro_batch_size
            own = [row[first : first + plan.micro_batch_size] for row in alone["tokens"]]
            assert rank["tokens"] == own
    # Not the same token over and over.
    assert len({token for row in alone["tokens"] for token in row}) > 2


@pytest.mark.parametrize("name", SERVED)
def test_a_replica_sends_what_its_layers_call_for(results: Results, name: str) -> None:
    execution = SERVED[name]
    model, plan = execution.model, execution.plan
    steps, batch = 1 + NUM_DECODES, plan.micro_batch_size
    rows = batch * (execution.workload.sequence_length + NUM_DECODES)
    wide = rows * model.hidden_size * 4
    for number, rank in enumerate(results[name]):
        stage = coordinates(plan, number).pp
        first = sum(plan.layers_per_stage[:stage])
        layers = range(first, first + plan.layers_per_stage[stage])
        told: dict[str, list[int]] = {}
        is_last = stage == plan.pp - 1
        if plan.tp > 1:
            # Two sums a layer, one of the embedding, and the logits of the last tokens.
            sums = 2 * len(layers) + (stage == 0)
            told["tp all_reduce"] = [steps * sums, sums * wide]
            if is_last:
                told["tp all_gather"] = [steps, steps * batch * model.vocab_size // plan.tp * 4]
        if plan.dp > 1:
            num_mixtures = sum(has_experts(model, layer) for layer in layers)
            told["dp all_gather"] = [steps * num_mixtures, num_mixtures * wide]
            told["dp reduce_scatter"] = [steps * num_mixtures, num_mixtures * plan.dp * wide]
        if plan.pp > 1:
            told["pp send"] = [steps, steps * batch * 8 if is_last else wide]
        assert rank["traffic"] == told


def test_the_second_step_sees_the_update_of_the_first(results: Results) -> None:
    # Otherwise equal gradients would not mean equal updates.
    first, second = results[reference_name(LAYOUTS["dp2"])][0]["gradient_norms"]
    assert abs(first - second) > 1e-3 * first


def _without_routed(traffic: dict[str, list[int]]) -> dict[str, list[int]]:
    return {key: each for key, each in traffic.items() if key not in ROUTED}


def _routed_sum(ranks: list[dict[str, list[int]]]) -> list[int]:
    return [sum(rank.get(key, [0, 0])[part] for rank in ranks) for key in ROUTED for part in (0, 1)]
