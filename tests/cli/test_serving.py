"""``meshwright plan``, ``simulate`` and ``explain`` for serving: what they read, print, write and refuse."""

from __future__ import annotations

import csv
import gzip
import json

import pytest
import yaml

JOB = """\
schema_version: 1
kind: serving
model: llama-3.1-8b
cluster: {node: dgx-h100, count: 1}
workload:
  arrival: poisson
  rate: 6 /s
  input_length: {mean: 400, kind: lognormal, coefficient_of_variation: 0.5}
  output_length: 40
slo: {ttft_p99: 1 s, tpot_p99: 20 ms}
engine: vllm
constraints:
  precision: bf16
  tp: [1, 2]
  pp: 1
  max_num_batched_tokens: [2048, 8192]
  max_num_sequences: [64, 256]
"""
FLAGS = (
    *(
        "--serve",
        "--model",
        "llama-3.1-8b",
        "--cluster",
        "dgx-h100:1",
        "--engine",
        "vllm",
        "--precision",
        "bf16",
    ),
    *("--input-length", 400, "--output-length", 40, "--ttft-p99", "1s"),
)


@pytest.fixture(scope="module")
def planned(tmp_path_factory, meshwright):
    """The folder and the printed answer of the small serving job, once."""
    root = tmp_path_factory.mktemp("served")
    (root / "job.yaml").write_text(JOB)
    outcome = meshwright("plan", root / "job.yaml", "--out", root / "plans", "--verify", 2, "--top", 3)
    assert outcome.code == 0, outcome.stderr
    return root / "plans", outcome.stdout


@pytest.fixture
def plan_file(planned, folder):
    path = folder / "plan.yaml"
    path.write_text((planned[0] / "1.yaml").read_text())
    return path


def test_a_serving_job_is_planned_ranked_and_written(planned):
    folder, printed = planned
    report = json.loads((folder / "report.json").read_text())
    assert {"1.yaml", "report.json"} <= {path.name for path in folder.iterdir()}
    assert "llama-3.1-8b on 8 x h100-sxm-80" in printed
    assert "Pareto front" in printed
    assert "Binds:" in printed
    assert "Cheapest for the stated load of 6 requests/s" in printed
    assert "Calibration: h100-sxm-80" in printed
    assert report["num_simulated"] >= 2
    assert report["cheapest"]["num_gpus"] == 1
    values = [entry["prediction"]["output_tokens_per_second_per_gpu"] for entry in report["plans"]]
    assert values == sorted(values, reverse=True)
    for entry in report["plans"]:
        figures = entry["prediction"]
        assert figures["basis"] == "simulation"
        assert figures["ttft_p99_seconds"] <= 1.0
        assert figures["tpot_p99_seconds"] <= 0.02
        assert figures["load"] <= figures["load_bound"] * 1.0001
    assert any("fitted" in note or "borrowed" in note or "default" in note for note in report["constants"])


def test_a_plan_file_holds_all_it_was_made_from(planned):
    plan = yaml.safe_load((planned[0] / "1.yaml").read_text())
    assert (plan["kind"], plan["schema_version"], plan["written_by"]) == ("serving_plan", 1, "meshwright")
    assert plan["slo"] == {"ttft_p99": "1.0 s", "tpot_p99": "0.02 s"}
    assert plan["model"]["name"] == "llama-3.1-8b"
    assert set(plan["calibration"]) >= {"id", "sha256"}
    assert plan["constants"]
    assert plan["prediction"]["load_kind"] == "requests_per_second"


def test_bounds_alone_rank_at_once(meshwright):
    outcome = meshwright("plan", *FLAGS, "--concurrency", 32, "--verify", 0, "--json")
    report = json.loads(outcome.stdout)
    assert report["num_runs"] == 0
    assert report["plans"][0]["prediction"]["basis"] == "steady-state bound"
    assert report["plans"][0]["prediction"]["load_kind"] == "clients"


def test_tables_fit_a_hundred_columns_and_say_once_what_all_plans_share(meshwright, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    arguments = (
        "--model",
        "deepseek-v3",
        "--cluster",
        "dgx-h200:8",
        "--engine",
        "sglang",
        "--out",
        folder / "wide",
    )
    lengths = ("--input-length", 400, "--output-length", 40, "--rate", "4 /s", "--top", 8)
    text = meshwright("plan", "--serve", *arguments, *lengths, "--verify", 0, "--quiet").stdout
    lines = text.splitlines()
    assert lines[1].startswith("All of them: sglang, fp8_block, ")
    table = lines[2 : next(index for index, line in enumerate(lines) if line.startswith("Why: "))]
    assert len(table) > 20
    assert max(len(line) for line in table) <= 100
    assert not any("\u2026" in line for line in table)
    for words in ("attention_dp", "req/s", "TTFT", "mean s", "mean ms", "/user"):
        assert any(words in line for line in table), words


@pytest.mark.parametrize("seed", ["-1", "x", "1.5", "4294967296", ""])
@pytest.mark.parametrize("verb", ["plan", "simulate", "whatif", "validate", "place", "profile"])
def test_a_seed_is_a_whole_number_wherever_it_is_an_option(meshwright, folder, verb, seed):
    outcome = meshwright(verb, "nothing.yaml", f"--seed={seed}")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert f"'{seed}' is no seed; give a whole number from 0 to 4294967295" in outcome.stderr


def test_requests_are_simulated_one_by_one(meshwright, plan_file, folder):
    lines = [
        {"arrival_time_s": index / 5, "input_length": 100 + index, "output_length": 1 + index % 7}
        for index in range(40)
    ]
    (folder / "requests.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    arguments = (
        "--requests",
        "requests.jsonl",
        "--out",
        "results",
        "--timeline",
        "steps.json.gz",
        "--explain",
    )
    outcome = meshwright("simulate", plan_file, *arguments)
    assert outcome.code == 0, outcome.stderr
    assert "every limit holds" in outcome.stdout
    assert "Where the mean time to the first token goes" in outcome.stdout
    rows = list(csv.DictReader((folder / "results" / "requests.csv").read_text().splitlines()))
    assert [int(row["input_tokens"]) for row in rows] == [line["input_length"] for line in lines]
    for row in rows:
        parts = sum(float(row[f"{part}_s"]) for part in ("queue", "prefill", "transfer", "interference"))
        assert parts == pytest.approx(float(row["ttft_s"]), rel=1e-6)
        assert (row["tpot_s"] == "") == (row["output_tokens"] == "1")
    metrics = json.loads((folder / "results" / "metrics.json").read_text())
    assert metrics["num_requests"] == 40
    assert metrics["slo_violations"] == {}
    mean = sum(float(row["ttft_s"]) for row in rows) / 40
    assert metrics["ttft_mean_seconds"] == pytest.approx(mean, rel=1e-6)
    events = json.loads(gzip.decompress((folder / "steps.json.gz").read_bytes()))["traceEvents"]
    prompts = sum(event["args"]["prompt_tokens"] for event in events if event["ph"] == "X")
    assert prompts == sum(line["input_length"] for line in lines)
    # What Meshwright wrote may be written again.
    assert meshwright("simulate", plan_file, *arguments).code == 0


def test_the_plans_own_load_is_simulated_and_equal_seeds_agree(meshwright, plan_file):
    one, two = (json.loads(meshwright("simulate", plan_file, "--json", "--seed", 3).stdout) for _ in range(2))
    assert one == two
    assert one["requests_per_second"] == pytest.approx(6.0, rel=0.15)
    other = json.loads(meshwright("simulate", plan_file, "--json", "--seed", 4).stdout)
    assert other["ttft_mean_seconds"] != one["ttft_mean_seconds"]


def test_explain_splits_the_first_token_and_shows_long_contexts(meshwright, plan_file):
    assert "interference" in meshwright("explain", plan_file).stdout
    report = json.loads(meshwright("explain", plan_file, "--long-context", "--json").stdout)
    assert [row["context_tokens"] for row in report["rows"]][::6] == [4096, 10_000_000]
    printed = meshwright("plan", *FLAGS, "--rate", "2 /s", "--long-context").stdout
    assert "10,000,000*" in printed
    assert "does not fit" in printed


BAD_TRACES = {
    "empty": ("a.csv", "", "a.csv: the trace is empty"),
    "a header alone": ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "a.csv: the trace is empty"),
    "unsorted": (
        "a.jsonl",
        '{"arrival_time_s": 2, "input_length": 9, "output_length": 9}\n'
        '{"arrival_time_s": 1, "input_length": 9, "output_length": 9}\n',
        "a.jsonl:2:",
    ),
    "negative": ("a.jsonl", '{"arrival_time_s": -1, "input_length": 9, "output_length": 9}\n', "a.jsonl:1:"),
    "missing": ("a.csv", None, "a.csv: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_TRACES)
@pytest.mark.parametrize("verb", ["plan", "simulate"])
def test_a_bad_trace_is_one_message_and_nothing_written(meshwright, plan_file, folder, verb, case):
    name, text, says = BAD_TRACES[case]
    if text is not None:
        (folder / name).write_text(text)
    if verb == "plan":
        lengths = FLAGS[: FLAGS.index("--input-length")]
        outcome = meshwright(
            "plan", *lengths, "--ttft-p99", "1s", "--requests", name, "--out", "x", "--quiet"
        )
    else:
        outcome = meshwright("simulate", plan_file, "--requests", name, "--out", "x")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("error:") == 1
    assert says in outcome.stderr
    assert not (folder / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--rate", "2 /s", "--tpot-p99", "10us"), 3, "tpot_p99 binds: ask for at least"),
        (
            (
                "--rate",
                "90000 /s",
            ),
            3,
            "the load needs about",
        ),
        (("--rate", "2 /s", "--model", "deepseek-v3"), 3, "nodes instead of 1"),
        (
            (
                "--rate",
                "2",
            ),
            2,
            "--rate: '2' has no unit",
        ),
        (("--rate", "2 /s", "--concurrency", 2), 2, "give one of them"),
        (("--rate", "2 /s", "--slo", "ttft_p98=2s"), 2, "did you mean"),
        (("--rate", "2 /s", "--slo", "ttft_p95"), 2, "is not NAME=TIME"),
        (("--rate", "2 /s", "--global-batch-size", 4), 2, "--global-batch-size goes with training jobs"),
        (("--rate", "2 /s", "--pareto", "--max-seconds", 1), 2, "go with training jobs"),
        (("--rate", "2 /s", "--target", "sglang"), 2, "sglang serves engine sglang, not vllm"),
        (("--rate", "2 /s", "--prefill-cluster", "dgx-h300:1"), 2, "unknown node 'dgx-h300'"),
        (("--rate", "2 /s", "--objective", "energy"), 2, "objective: unknown value 'energy'"),
    ],
)
def test_a_request_that_cannot_be_planned_is_one_message(meshwright, folder, arguments, code, says):
    outcome = meshwright("plan", *FLAGS, *arguments, "--out", "x", "--quiet")
    assert (outcome.code, outcome.stdout) == (code, "")
    assert outcome.stderr.startswith("error: ")
    assert says in outcome.stderr
    assert not (folder / "x").exists()


def test_serving_flags_need_a_serving_job(meshwright, job):
    outcome = meshwright("plan", job, "--ttft-p99", "2s")
    assert outcome.code == 2
    assert "--ttft-p99 goes with serving jobs" in outcome.stderr


@pytest.mark.parametrize(
    ("old", "new", "code", "says"),
    [
        (
            "policy: chunked_prefill",
            "policy: orca",
            2,
            "pool: policy orca (it has chunked_prefill",
        ),
        ("engine: vllm", "engine: sglang", 0, ""),
        ("engine: vllm", "engine: trtllm", 0, ""),
        ("num_replicas: ", "num_replicas: 9", 2, "GPUs, but the cluster has 8"),
        (
            "block_size: 16",
            "block_size: 16\n    kv_cache_tokens: 99999999",
            3,
            "do not fit; beside the weights a rank holds",
        ),
        (
            "block_size: 16",
            "block_size: 16\n    kv_cache_tokens: 64",
            3,
            "does not fit the KV cache of 64 tokens of one engine; split the model",
        ),
        ("precision: bf16", "precision: nvfp4", 2, "h100-sxm-80 has no units for nvfp4"),
    ],
)
def test_a_plan_that_cannot_run_is_one_message(meshwright, plan_file, folder, old, new, code, says):
    text = plan_file.read_text()
    assert old in text
    plan_file.write_text(text.replace(old, new, 1))
    outcome = meshwright("simulate", plan_file, "--out", "x")
    assert outcome.code == code, outcome.stderr
    assert says in outcome.stderr
    assert (folder / "x").exists() == (code == 0)


def test_flags_of_the_other_kind_of_plan_are_refused(meshwright, plan_file, flat_plan, folder):
    outcome = meshwright("simulate", plan_file, "--jitter", "2%")
    assert outcome.code == 2
    assert "--jitter goes with training plans" in outcome.stderr
    training = folder / "training.yaml"
    training.write_text(flat_plan)
    outcome = meshwright("simulate", training, "--requests", "a.csv")
    assert outcome.code == 2
    assert "--requests, --explain and --policy go with serving plans" in outcome.stderr
    assert meshwright("explain", training, "--long-context").code == 2


def test_files_of_others_are_never_replaced(meshwright, plan_file, folder):
    (folder / "results").mkdir()
    (folder / "results" / "requests.csv").write_text("mine\n")
    outcome = meshwright("simulate", plan_file, "--out", "results")
    assert outcome.code == 2
    assert "was not written by Meshwright" in outcome.stderr
    assert (folder / "results" / "requests.csv").read_text() == "mine\n"
    assert not (folder / "results" / "metrics.json").exists()
    assert meshwright("simulate", plan_file, "--out", "results", "--force").code == 0


def test_two_plans_are_compared_term_by_term(meshwright, planned, plan_file, folder):
    other = folder / "other.yaml"
    other.write_text(plan_file.read_text().replace("max_num_sequences: ", "max_num_sequences: 1"))
    report = json.loads(meshwright("diff", plan_file, other, "--json").stdout)
    assert {each["key"] for each in report["fields"]} == {"max_num_sequences"}
    terms = {each["name"]: each for each in report["latency_seconds"]}
    parts = [each["first"] for name, each in terms.items() if name.startswith("TTFT: ")]
    assert sum(parts) == pytest.approx(terms["TTFT mean"]["first"])
    printed = meshwright("diff", plan_file, planned[0] / "2.yaml").stdout
    for words in (
        "What differs",
        "TTFT: interference",
        ": kv cache",
        "J per output token",
        "Why: ",
    ):
        assert words in printed
    same = meshwright("diff", plan_file, plan_file).stdout
    assert "The plans and their jobs are the same." in same
    assert "the first token takes as long; each further token takes as long." in same


def test_whatif_plans_again_and_serves_the_stated_load_on_changed_machines(meshwright, plan_file):
    changes = ("--set", "gpu.memory_bandwidth=8TB/s", "--set", "slo.tpot_p99=15 ms")
    report = json.loads(meshwright("whatif", plan_file, *changes, "--json").stdout)
    assert report["kind"] == "serving_whatif"
    assert report["changes"] == [
        {"key": "gpu.memory_bandwidth", "before": 3.35e12, "after": 8e12},
        {"key": "slo.tpot_p99", "before": 0.02, "after": 0.015},
    ]
    rates = {
        when: {
            which: report[when][which]["prediction"]["output_tokens_per_second_per_gpu"]
            for which in ("this_plan", "best_plan")
        }
        for when in ("today", "changed")
    }
    assert all(each["best_plan"] >= each["this_plan"] > 0.0 for each in rates.values())
    assert report["changed"]["this_plan"]["plan"] == report["today"]["this_plan"]["plan"]
    assert report["changed"]["this_plan"]["prediction"]["tpot_p99_seconds"] <= 0.015
    stated = report["at_stated_load"]
    tpot = next(each for each in stated["latency_seconds"] if each["name"] == "TPOT mean")
    # Decoding a small batch reads the weights: at most as much quicker as the memory is.
    assert 3.35 / 8 <= tpot["second"] / tpot["first"] < 0.8
    assert {each["key"] for each in stated["fields"]} == {
        "node.gpu.memory_bandwidth_bytes_per_second",
        "tpot_p99",
    }


def test_whatif_prints_both_plans_before_and_after_and_why(meshwright, plan_file):
    text = meshwright("whatif", plan_file, "--set", "gpu.memory=40GiB", "--quiet").stdout
    for words in (
        "llama-3.1-8b: what if gpu.memory 79.65 GiB -> 40 GiB?",
        "this plan, today",
        "best plan, changed",
        "Why: with the change this plan carries ",
        "This plan on the stated load",
        "There the first token takes ",
    ):
        assert words in text
    assert "-0.0%" not in text


def test_whatif_without_a_change_ranks_what_a_serving_plan_depends_on(meshwright, plan_file, monkeypatch):
    from meshwright.planner import sensitivity

    names = ("memory bandwidth", "GPU memory", "inter-node bandwidth")
    levers = tuple(lever for lever in sensitivity.SERVING_LEVERS if lever.name in names)
    monkeypatch.setattr(sensitivity, "SERVING_LEVERS", levers)
    text = meshwright("whatif", plan_file, "--quiet").stdout
    assert "output tokens/s/GPU within the limits today; change of this plan's tokens/s/GPU" in text
    assert text.index("memory bandwidth") < text.index("inter-node bandwidth")
    assert "GPU memory times 2: the best plan " in text


def test_the_keys_of_a_serving_plan_are_listed(meshwright, plan_file):
    listed = json.loads(meshwright("whatif", plan_file, "--list", "--json").stdout)["keys"]
    values = {each["key"]: each["value"] for each in listed}
    assert values["workload.rate"] == 6.0
    assert values["slo.ttft_p99"] == 1.0
    assert values["workload.concurrency"] is None
    assert "fabric.oversubscription" in values
    assert not any(key.startswith("software") for key in values)


def test_a_change_that_breaks_the_plan_is_told_beside_the_best_plan(meshwright, plan_file):
    text = meshwright("whatif", plan_file, "--set", "cluster.nodes=2", "--set", "slo.tpot_p99=1us").stdout
    assert "cannot run: slo" in text
    assert "This plan cannot run, by constraint 'slo' (some load keeps every limit): tpot_p99 " in text
    assert "No plan fits the change; closest: " in text
    small = json.loads(meshwright("whatif", plan_file, "--set", "gpu.memory=12GiB", "--json").stdout)
    assert small["changed"]["this_plan"]["violation"]["constraint"] == "memory"
    assert small["at_stated_load"] is None
    fewer = json.loads(meshwright("whatif", plan_file, "--set", "cluster=gh200-1:1", "--json").stdout)
    assert fewer["changed"]["this_plan"]["violation"]["constraint"] == "cluster"
    assert fewer["changed"]["best_plan"]["plan"]["pools"][0]["num_replicas"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "workload.lora_rank=8"), "unknown key 'workload.lora_rank'"),
        (("--set", "workload.concurrency=8"), "workload.concurrency: the load is 6 requests/s, not clients"),
        (("--set", "slo.tpot_p99=0 s"), "slo.tpot_p99 must be above 0 seconds"),
        (("--memory-headroom", "9 %"), "--memory-headroom: not for serving plans"),
        (("--objective", "energy"), "objective: unknown value 'energy'; known: goodput_per_gpu"),
        (("--factor", "1"), "the factor must lie above 1"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_message(meshwright, plan_file, arguments, says):
    outcome = meshwright("whatif", plan_file, *arguments)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert says in outcome.stderr


def test_plans_of_two_kinds_are_not_compared(meshwright, plan_file, flat_plan, folder):
    training = folder / "training.yaml"
    training.write_text(flat_plan)
    outcome = meshwright("diff", training, plan_file)
    assert outcome.code == 2
    assert "is a serving plan and" in outcome.stderr


def test_failed_requests_of_a_trace_are_left_out_with_a_note(meshwright, plan_file, folder):
    (folder / "burst.csv").write_text("Timestamp,Request tokens,Response tokens\n0,90,9\n1,80,0\n2,70,7\n")
    printed = meshwright("simulate", plan_file, "--requests", "burst.csv").stdout
    assert "2 requests in" in printed
    assert "Note: 1 recorded request without an answer (failed) left out." in printed
