from __future__ import annotations

import csv
from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.profiler.serving_runs import (
    ServingRun,
    UnstatedLoadError,
    decode_setup,
    is_serving_table,
    prefill_setup,
    read_serving_runs,
    serving_setup,
)

TABLE = Path(__file__).parents[1] / "validation" / "serving_runs.csv"
RUNS = {run.id: run for run in read_serving_runs(TABLE)}


def changed(run: ServingRun, **cells: str) -> ServingRun:
    return ServingRun(
        id=run.id,
        quality=run.quality,
        line=run.line,
        ttft_mean=run.ttft_mean,
        tpot_mean=run.tpot_mean,
        cells={**run.cells, **cells},
    )


def test_the_published_table_is_read_whole() -> None:
    assert len(RUNS) == 1132
    assert is_serving_table(TABLE)
    assert not is_serving_table(TABLE.with_name("training_runs.csv"))
    assert not is_serving_table(TABLE.parent)


@pytest.mark.parametrize(
    ("run_id", "degrees", "clients"),
    [
        ("serve-00027", (2, 1, 2, 1), 64),  # as stated
        ("serve-00333", (4, 1, 1, 4), 32),  # tp 16 = 4 x 4: four GPUs
        ("serve-00702", (1, 4, 1, 4), 256),  # attention_dp 16 = 4 x 4, concurrency per labelled rank
        ("serve-04474", (4, 1, 1, 4), 64),  # load multiplied by attention_dp 4, run on four GPUs
        ("serve-02955", (1, 8, 1, 8), 256),  # attention data parallel as stated
        ("serve-01690", (2, 1, 2, 1), 16),
        ("serve-00630", (8, 1, 1, 8), 8),  # expert ranks that no label told before 2025-11-03
        ("serve-00470", (8, 1, 1, 8), 64),
        (
            "serve-01697",
            (2, 2, 4, 1),
            14,
        ),  # four expert ranks of two tp: data parallel attention that no column states
    ],
)
def test_labels_are_read_as_the_gpus_that_ran(run_id: str, degrees: tuple[int, ...], clients: int) -> None:
    setup = serving_setup(RUNS[run_id])
    pool = setup.plan.pools[0]
    assert (pool.tp, pool.attention_dp, pool.moe_tp, pool.ep) == degrees
    assert setup.num_clients == clients


def test_dense_models_ignore_expert_degrees() -> None:
    pool = serving_setup(RUNS["serve-03748"]).plan.pools[0]
    assert (pool.tp, pool.moe_tp, pool.ep) == (4, 1, 1)


def test_every_aggregated_row_has_a_setup() -> None:
    for run in RUNS.values():
        if not run.is_disaggregated:
            setup = serving_setup(run)
            assert setup.num_requests >= 8 * setup.num_clients
            assert setup.max_num_sequences in (setup.num_clients, setup.num_clients - 1, 1)


@pytest.mark.parametrize(
    ("run_id", "steps"),
    [
        ("serve-00702", 60),  # trtllm, four attention ranks
        ("serve-00470", 0),  # trtllm, one
        ("serve-03715", 20),  # trtllm, dense, 1,024 tokens in and out at tp 4
        ("serve-03666", 0),  # the same at tp 8
        ("serve-03495", 0),  # and with longer answers
        ("serve-02915", 40),  # trtllm 1.2.0rc6.post2, fp8, 64 clients
        ("serve-02907", 0),  # the same with four
        ("serve-00333", 30),  # sglang on B200, 32 clients
        ("serve-02185", 10),  # sglang on B200, 4 clients
        ("serve-05210", 0),  # sglang on H200
        ("serve-04474", 0),  # vllm
    ],
)
def test_prompts_wait_as_the_recipes_launch_flags_say(run_id: str, steps: int) -> None:
    assert serving_setup(RUNS[run_id]).prompt_wait_steps == steps


def test_attention_ranks_follow_the_load_where_the_recipe_chose_them_by_it() -> None:
    run = RUNS["serve-00630"]
    few, many = (serving_setup(changed(run, concurrency=clients)) for clients in ("64", "65"))
    assert few.plan.pools[0].attention_dp == 1
    assert (many.plan.pools[0].tp, many.plan.pools[0].attention_dp, many.plan.pools[0].ep) == (1, 8, 8)
    assert many.num_clients == 65
    labelled = serving_setup(changed(run, concurrency="65", engine_version="1.1.0rc2.post2"))
    assert (labelled.plan.pools[0].attention_dp, labelled.plan.pools[0].ep) == (1, 1)


@pytest.mark.parametrize(
    ("run_id", "tokens"),
    [
        ("serve-01637", 2000 + 1500 + 448),  # sglang 0.5.6.post2, fixed lengths
        ("serve-00965", 0),  # sglang 0.5.1.post1
        ("serve-01690", 0),  # vllm
    ],
)
def test_generated_launches_mix_a_prompt_and_what_decodes(run_id: str, tokens: int) -> None:
    setup = serving_setup(RUNS[run_id])
    assert setup.mixed_step_tokens == tokens
    assert setup.num_requests == setup.num_clients * (10 if tokens else 9)


def test_prefill_ranks_are_shared_by_decode_ranks() -> None:
    setup, ranks = prefill_setup(RUNS["serve-00270"])  # five workers of eight ranks for one of 32
    assert setup.plan.pools[0].attention_dp == 8
    assert ranks == 5 * 8 / 32


def test_lengths_vary_where_the_recipe_varies_them() -> None:
    assert serving_setup(RUNS["serve-00357"]).length_ratio == 0.8  # labelled 1.0, repeats rows labelled 0.8
    fixed = next(run for run in RUNS.values() if run.cell("engine_version") == "0.12.0")
    assert serving_setup(fixed).length_ratio == 1.0


def test_unsaid_drafts_are_taken_for_what_the_times_say() -> None:
    drafting = serving_setup(RUNS["serve-02738"]).plan.pools[0]
    plain = serving_setup(RUNS["serve-02907"]).plan.pools[0]
    assert drafting.num_speculative_tokens > 0
    assert plain.num_speculative_tokens == 0
    unnamed = changed(RUNS["serve-00630"], length_ratio="0.8")
    assert serving_setup(unnamed).plan.pools[0].num_speculative_tokens == 0


@pytest.mark.parametrize(
    ("cells", "drafts"),
    [
        ({}, 3),
        ({"tp": "8", "moe_tp": "8"}, 0),
        ({"moe_tp": "1", "moe_ep": "4"}, 0),
        ({"engine_version": "0.5.10"}, 0),
    ],
)
def test_drafts_follow_from_degrees_that_only_one_recipe_has(cells: dict[str, str], drafts: int) -> None:
    pool = serving_setup(changed(RUNS["serve-02185"], **cells)).plan.pools[0]
    assert pool.num_speculative_tokens == drafts


@pytest.mark.parametrize(
    ("run_id", "release", "ep"),
    [
        ("serve-00464", "0.5.3rc1", 4),
        ("serve-00584", "0.5.3rc1", 8),
        ("serve-04137", "0.5.5", 8),
        ("serve-00630", "1.1.0rc2.post2", 8),
        ("serve-00470", "unstated", 8),  # gpt-oss of the same labels changed its release
        ("serve-03178", "unstated", 72),  # another system's recipe
        ("serve-02033", "0.5.9", 4),
    ],
)
def test_unnamed_releases_follow_from_the_recipes_history(run_id: str, release: str, ep: int) -> None:
    setup = serving_setup(RUNS[run_id])
    assert (setup.plan.engine_version, setup.plan.pools[0].ep) == (release, ep)


def test_rows_of_separate_pools_state_a_decode_batch_but_no_clients() -> None:
    run = next(run for run in RUNS.values() if run.is_disaggregated)
    with pytest.raises(UnstatedLoadError, match="how many clients"):
        serving_setup(run)
    setup, batch = decode_setup(run)
    assert batch == float(run.cell("decode_batch"))
    assert setup.plan.pools[0].gpus_per_replica >= 1
    with pytest.raises(UnstatedLoadError, match="decode batch"):
        decode_setup(changed(run, decode_batch=""))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"engine": "vlm"}, "did you mean 'vllm'"),
        ({"precision": "fp7"}, "precision 'fp7' is none of"),
        ({"model": "nobody/no-model"}, "unknown model"),
        ({"gpu": "H900"}, "H900"),
        ({"concurrency": "many"}, "concurrency: 'many' is not a whole number"),
    ],
)
def test_a_bad_cell_is_named(cells: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        serving_setup(changed(RUNS["serve-00027"], **cells))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("ttft_mean_s", "-1", "ttft_mean_s must be a finite number above zero"),
        ("tpot_mean_s", "fast", "tpot_mean_s: 'fast' is not a number"),
        ("mode", "both", "mode: 'both' is not one of"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(tmp_path: Path, column: str, value: str, message: str) -> None:
    with TABLE.open(newline="") as stream:
        row = next(csv.DictReader(stream))
    path = tmp_path / "runs.csv"
    path.write_text(",".join(row) + "\n" + ",".join({**row, column: value}.values()) + "\n")
    with pytest.raises(SpecError, match=rf"runs\.csv:2: {message}"):
        read_serving_runs(path)
    path.write_text("id,engine,colour\n")
    with pytest.raises(SpecError, match="unknown column 'colour'"):
        read_serving_runs(path)
