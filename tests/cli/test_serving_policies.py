"""``meshwright simulate --policy``: one serving plan under every way to form engine steps."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest

from meshwright.simcore.domain.serving import PolicyName

POLICIES = get_args(PolicyName)
NUM_REQUESTS = 60
JOB = """\
schema_version: 1
kind: serving
model: llama-3.1-8b
cluster: {node: dgx-h100, count: 1}
workload: {arrival: poisson, rate: 2 /s, input_length: 400, output_length: 40}
slo: {ttft_p99: 1 s}
engine: vllm
objective: cost
constraints: {mode: aggregated, precision: bf16, tp: 1, pp: 1, max_num_batched_tokens: 2048, max_num_sequences: 64}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory, meshwright):
    """The simulation of one plan by policy, on a load that keeps its engine busy."""
    root = tmp_path_factory.mktemp("policies")
    (root / "job.yaml").write_text(JOB)
    outcome = meshwright("plan", root / "job.yaml", "--verify", 0, "--out", root / "plans")
    assert outcome.code == 0, outcome.stderr
    generator = np.random.default_rng(7)
    lines = [
        {"arrival_time_s": index / 6, "input_length": int(prompt), "output_length": int(answer)}
        for index, (prompt, answer) in enumerate(
            zip(
                generator.integers(500, 6000, NUM_REQUESTS),
                generator.integers(20, 200, NUM_REQUESTS),
                strict=True,
            )
        )
    ]
    (root / "requests.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    plan = root / "plans" / "1.yaml"
    arguments = ("simulate", plan, "--requests", root / "requests.jsonl", "--json")
    outcomes = {word: meshwright(*arguments, "--policy", word) for word in POLICIES}
    assert {outcome.code for outcome in outcomes.values()} == {0}, outcomes
    outcomes["as planned"] = meshwright(*arguments)
    return plan, lines, {word: json.loads(outcome.stdout) for word, outcome in outcomes.items()}


def test_every_policy_serves_all_requests_and_says_when_it_is_not_the_engines(served):
    _, lines, results = served
    tokens = sum(line["output_length"] for line in lines)
    for word in POLICIES:
        result = results[word]
        assert result["num_requests"] == NUM_REQUESTS
        assert result["plan"]["pools"][0]["policy"] == word
        made = result["output_tokens_per_second"] * result["duration_seconds"]
        assert made == pytest.approx(tokens, rel=1e-9)
        assert ("policy_note" in result) == (word != "chunked_prefill")
    assert results["orca"]["policy_note"].startswith("policy orca is not what vllm does;")
    assert results["chunked_prefill"] == results["as planned"]


def test_policies_differ_as_their_papers_say(served):
    results = served[2]

    def ttft(word):
        return results[word]["ttft_mean_seconds"]

    # Yu et al., OSDI 2022: a request that waits for a whole batch to end waits far longer than for an iteration.
    assert ttft("static") > 3 * max(ttft(word) for word in POLICIES if word != "static")
    # Agrawal et al., OSDI 2024: whole prompts between decoding steps stall the answers under way, chunks less.
    assert results["prefill_first"]["tpot_p99_seconds"] > results["chunked_prefill"]["tpot_p99_seconds"]
    # Nobody joins a static batch, so its answers are never interrupted.
    assert results["static"]["tpot_p99_seconds"] < results["chunked_prefill"]["tpot_p99_seconds"]


@pytest.mark.parametrize(
    "text",
    [
        "prompt_len,output_len\n300,20\n40,7\n",
        '{"prompt_len": 300, "output_len": 20}\n{"prompt_len": 40, "output_len": 7}',
    ],
)
def test_lengths_without_times_come_at_the_plans_own_rate(served, meshwright, folder, text):
    (folder / "lengths").write_text(text)
    outcome = meshwright("simulate", served[0], "--requests", "lengths", "--json")
    assert outcome.code == 0, outcome.stderr
    result = json.loads(outcome.stdout)
    assert result["num_requests"] == 2
    assert (result["workload"]["arrival"], result["workload"]["requests"]) == ("poisson", "lengths")
    assert result["output_tokens_per_second"] * result["duration_seconds"] == pytest.approx(27.0)


def test_what_makes_no_sense_is_one_message(served, meshwright, flat_plan, folder):
    plan = served[0]
    outcome = meshwright("simulate", plan, "--policy", "orcaa")
    assert outcome.code == 2
    assert "--policy: unknown policy 'orcaa'; did you mean 'orca'?" in outcome.stderr
    (folder / "training.yaml").write_text(flat_plan)
    outcome = meshwright("simulate", "training.yaml", "--policy", "orca")
    assert outcome.code == 2
    assert "--policy go with serving plans" in outcome.stderr
    shown = meshwright("simulate", plan, "--policy", "static").stdout
    assert "Note: policy static is not what vllm does; kernels, host time" in shown
