"""Tables of schedules are what torch itself would write, and torch loads them."""

from __future__ import annotations

import csv
import warnings

import pytest
from export_cases import CASES, check_refusal, make_job, make_plan

from meshwright.planner.export import EXPORTERS
from meshwright.planner.export.torchtitan_schedule import PLACED_LIKE, schedule_csv
from meshwright.simcore.domain.plan import partition_layers
from meshwright.simcore.schedules import SCHEDULES

NUM_MICRO_BATCHES = 12


def plan_of(schedule: str, pp: int):
    vpp = 1 if PLACED_LIKE.get(schedule) == "1F1B" else 2
    return make_plan(
        dp=2,
        pp=pp,
        vpp=vpp,
        schedule=schedule,
        sharding="zero3",
        layers_per_stage=partition_layers(32, pp * vpp),
    )


def loaded_by_torch(path, pp, num_stages):
    """Return the runtime of torch that has read and checked a table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    runtime = object.__new__(_PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = pp, num_stages, NUM_MICRO_BATCHES
    runtime._stages, runtime.pipeline_order, runtime._defer_pp_recv = [], {}, False
    runtime._load_csv(str(path))
    return runtime


@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("schedule", sorted(PLACED_LIKE))
def test_torch_loads_the_table_and_places_stages_as_torchtitan_does(schedule, pp, tmp_path):
    plan = plan_of(schedule, pp)
    text = schedule_csv(make_job(batch=2 * NUM_MICRO_BATCHES), plan)
    (tmp_path / "schedule.csv").write_text(text)
    num_stages = pp * plan.vpp
    runtime = loaded_by_torch(tmp_path / "schedule.csv", pp, num_stages)
    placement = SCHEDULES[schedule].placement(pp, plan.vpp)
    expected = {int(stage): rank for rank in range(pp) for stage in placement[rank]}
    assert runtime.stage_index_to_group_rank == expected
    if plan.vpp == 2:
        # torchtitan gives rank r the stages r and last - r of a V.
        assert expected == {stage: min(stage, num_stages - 1 - stage) for stage in range(num_stages)}
    runtime._dump_csv(str(tmp_path / "dumped.csv"), "compute_only")
    with (tmp_path / "dumped.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [line.split(",") for line in text.splitlines()]
    # What torch adds is one send and one receive per border of stages, direction and micro-batch.
    added = [str(action) for row in runtime.pipeline_order_with_comms.values() for action in row]
    crossing = sum(expected[stage] != expected[stage + 1] for stage in range(num_stages - 1))
    assert sum("SEND_F" in action for action in added) == crossing * NUM_MICRO_BATCHES
    assert sum("RECV_B" in action for action in added) == crossing * NUM_MICRO_BATCHES


@pytest.mark.parametrize("target", ["torchtitan", "torchtitan-0.2"])
def test_the_launch_names_the_table_and_a_schedule_that_places_alike(target):
    job, plan = CASES["torchtitan_schedule_table"][2:]
    files = {file.name: file.text for file in EXPORTERS[target].export(job, plan, "torchrun").files}
    assert '--parallelism.pipeline-parallel-schedule-csv "$EXPORT_DIR/schedule.csv"' in files["launch.sh"]
    assert "ZBVZeroBubble" in files.get("args.sh", files.get("job.toml"))
    assert len(files["schedule.csv"].splitlines()) == plan.pp
    assert (
        'components = ["loss"]' in files.get("job.toml", "")
        or "--compile.components loss" in files["args.sh"]
    )


def test_schedules_of_two_models_have_no_table():
    plan = make_plan(dp=8, pp=2, schedule="dualpipe")
    check_refusal("torchtitan", make_job(software="torchtitan"), plan, ["'dualpipe'", "'dualpipe_v'"])
