"""A corpus of mistakes: each ends with one message that says what, where and how to fix it, and writes nothing.

A mistake is a valid text with one place changed (``old`` becomes ``new``), or a whole file.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FLAGS = {
    "--model": "llama-3.2-1b",
    "--cluster": "l4-8:1",
    "--global-batch-size": "16",
    "--sequence-length": "1024",
}

CLUSTER = """\
schema_version: 1
id: lab
node:
  base: l4-8
  num_gpus: 8
  gpu: {base: l4, memory: 22 GiB}
  nic: {kind: ethernet, bandwidth: 100 Gbit/s, latency: 20 us}
  num_nics: 1
count: 1
fabric: {base: ethernet, latency: 25 us, oversubscription: 1}
"""

CONFIG = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
}


class Edit(NamedTuple):
    """One place of a valid text changed, and what the message must say."""

    old: str
    new: str
    says: str


JOB_EDITS = [
    Edit(
        "schema_version: 1", "schema_version: 2", "job.yaml:1: schema_version: this release reads version 1"
    ),
    Edit("schema_version: 1\n", "", "schema_version: is required but missing"),
    Edit("schema_version", "schema_verison", "is 'schema_verison' meant to be it?"),
    Edit("kind: training", "kind: serving", "job.yaml:6: workload: no load"),
    Edit("kind: training", "kind: trainning", "did you mean 'training'?"),
    Edit(
        "kind: training", "kind: training\nkind: training", "job.yaml:3: kind: given twice (first on line 2)"
    ),
    Edit("llama-3.2-1b", "llama-3.2-1bb", "job.yaml:3: model: unknown model 'llama-3.2-1bb'; did you mean"),
    Edit("llama-3.2-1b", "a" * 300, "job.yaml:3: model: unknown model"),
    Edit("llama-3.2-1b", "missing.json", "missing.json: cannot be read: No such file"),
    Edit("llama-3.2-1b", "1", "job.yaml:3: model: expected text, got the number 1"),
    Edit("llama-3.2-1b", "[llama-3.2-1b]", "job.yaml:3: model: expected a single value, got a list"),
    Edit("model: llama-3.2-1b\n", "", "no model: name a preset"),
    Edit("llama-3.2-1b", "mixtral-8x7c", "did you mean 'mixtral-8x7b'"),
    Edit(
        "llama-3.2-1b", "{name: x, hidden_size: 8}", "job.yaml:3: model.num_layers: is required but missing"
    ),
    Edit(
        "llama-3.2-1b",
        "{name: x, num_layers: 100000000, hidden_size: 8, ffn_hidden_size: 8, num_attention_heads: 1,"
        " num_query_groups: 1, head_dim: 8, vocab_size: 8, max_position_embeddings: 8, is_gated_mlp: true,"
        " has_tied_embeddings: true}",
        "num_layers must be at most",
    ),
    Edit("node: l4-8", "node: l4-9", "job.yaml:4: cluster.node: unknown node 'l4-9'; did you mean"),
    Edit("{node: l4-8, count: 1}", "l4-8:none", "the number of nodes is 'none'"),
    Edit(
        "{node: l4-8, count: 1}",
        "selen",
        "job.yaml:4: cluster: unknown cluster 'selen'; did you mean 'selene'",
    ),
    Edit("{node: l4-8, count: 1}", "nowhere.yaml", "nowhere.yaml: no such file"),
    Edit("{node: l4-8, count: 1}", "{preset: eos, node: l4-8}", "is given beside 'preset'"),
    Edit("count: 1", "count: 0", "job.yaml:4: cluster.count: must be at least 1"),
    Edit("count: 1", "count: 1.5", "job.yaml:4: cluster.count: expected a whole number"),
    Edit("count: 1", "count: 99999999", "job.yaml:4: cluster.count: must be at most"),
    Edit("count: 1", "count: 1, nodes: 2", "job.yaml:4: cluster.nodes: unknown key"),
    Edit("batch_size: 16", "batch_size: 0", "job.yaml:6: workload.global_batch_size: must be at least 1"),
    Edit(
        "batch_size: 16", "batch_size: 1e1", "job.yaml:6: workload.global_batch_size: expected a whole number"
    ),
    Edit("batch_size: 16", "batch_size: '16'", "remove the quotes"),
    Edit("batch_size: 16", "batch_size: .nan", "is not a finite number"),
    Edit("batch_size: 16", "batch_size: 999999999999999999", "workload.global_batch_size"),
    Edit("  global_batch_size: 16\n", "", "no global batch size"),
    Edit("global_batch_size", "global_batchsize", "global_batchsize: unknown key; did you mean"),
    Edit("length: 1024", "length: -1024", "job.yaml:7: workload.sequence_length: must be at least 1"),
    Edit("length: 1024", "length: 999999999999999999", "workload.sequence_length"),
    Edit("  sequence_length: 1024\n", "", "no sequence length"),
    Edit("precision: bf16", "precision: bf17", "unknown precision 'bf17'; did you mean 'bf16'?"),
    Edit("precision: bf16", "precision: nvfp4", "l4 has no nvfp4 units"),
    Edit("precision: bf16", "  precision: bf16", "not valid YAML"),
    Edit("precision: bf16", "\tprecision: bf16", "not valid YAML"),
    Edit("software: megatron-core", "software: megatron-cor", "job.yaml:9: software: unknown software"),
    Edit("objective: throughput", "objective: speed", "job.yaml:10: objective: unknown"),
    Edit("memory_headroom: 5 %", "memory_headroom: 5", "'5' has no unit; write for example '5 %'"),
    Edit("memory_headroom: 5 %", "memory_headroom: 100 %", "must be 0 % to below 100 %"),
    Edit("memory_headroom: 5 %", "memory_headroom: -5 %", "must be a finite quantity, not negative"),
    Edit("memory_headroom: 5 %", "target: megatrn", "unknown target 'megatrn'; did you mean 'megatron'"),
    Edit("tp: [1, 2]", "tp: [0]", "job.yaml:13: constraints.tp: list whole numbers above zero"),
    Edit("tp: [1, 2]", "tp: []", "job.yaml:13: constraints.tp: list whole numbers above zero"),
    Edit("tp: [1, 2]", "tp: [two]", "job.yaml:13: constraints.tp[0]: expected a whole number"),
    Edit("tp: [1, 2]", "tpp: [1, 2]", "job.yaml:13: constraints.tpp: unknown key"),
    Edit("tp: [1, 2]", "schedule: 1f1bb", "unknown value '1f1bb'; did you mean '1f1b'?"),
    Edit("tp: [1, 2]", "sequence_parallel: yes", "expected true or false, got 'yes'"),
    Edit("recompute: none", "recompute: all", "constraints.recompute: unknown value 'all'"),
    Edit("tp: [1, 2]", "tp: &a [1, *a]", "anchor '&a' is not supported"),
    Edit("tp: [1, 2]", "<<: {tp: 1}", "merge key '<<' is not supported"),
    Edit("tp: [1, 2]", "tp: !!python/object:os.system 1", "tag"),
    Edit("tp: [1, 2]", "tp: [1, 2", "not valid YAML"),
    Edit("tp: [1, 2]", "? [1, 2]\n  : 3", "a key is itself a list or mapping"),
    Edit("tp: [1, 2]", "1: 2", "key '1' is not text"),
]

WHOLE_JOBS = {
    "empty": (b"", "job.yaml: is empty"),
    "only a comment": (b"# later\n", "job.yaml: is empty"),
    "a list": (b"- 1\n- 2\n", "expected 'key: value' lines at the top, got a list"),
    "a word": (b"hello", "expected 'key: value' lines at the top"),
    "two documents": (b"a: 1\n---\nb: 2\n", "a second document starts"),
    "an endless alias": (b"a: &a [*a]\n", "is not supported; write the value out"),
    "binary": (bytes(range(256)) * 4, "job.yaml: is a binary file"),
    "latin-1": ("kind: f\xfcr".encode("latin-1"), "job.yaml:1: is not UTF-8 text"),
    "utf-16": ("kind: training".encode("utf-16"), "is not UTF-8 text"),
    "a control character": (b"kind: \x07\n", "holds the control character '\\x07'"),
    "10 MB": (b"# padding\n" * 1_000_000 + b"kind: training\n", "is 10.0 MB; spec files may be 5 MB at most"),
    "3,000 levels of lists": (b"a: " + b"[" * 3000 + b"]" * 3000, "nested deeper than 32 levels"),
    "3,000 levels of keys": (b"{a: " * 3000 + b"1" + b"}" * 3000, "nested deeper than 32 levels"),
    "too many values": (b"a: [" + b"1," * 300_000 + b"1]", "more than 200000 values"),
    "a plan file": (
        b"schema_version: 1\nkind: training_plan\n",
        "job.yaml:2: kind: unknown kind 'training_plan'",
    ),
}

CLUSTER_EDITS = [
    Edit("schema_version: 1", "schema_version: 7", "lab.yaml:1: schema_version: this version reads schema 1"),
    Edit("base: l4-8", "base: l4-80", "lab.yaml:4: node.base: unknown node 'l4-80'; did you mean 'l4-8'?"),
    Edit("base: l4,", "base: l5,", "lab.yaml:6: node.gpu.base: unknown GPU 'l5'"),
    Edit("num_gpus: 8", "num_gpus: -8", "lab.yaml:5: node.num_gpus: must be at least 1, not -8"),
    Edit("memory: 22 GiB", "memory: 22", "lab.yaml:6: node.gpu.memory: '22' has no unit"),
    Edit("memory: 22 GiB", "memory: 22 GB/s", "unknown unit 'GB/s' for bytes"),
    Edit("memory: 22 GiB", "memory: 0 GiB", "must be above zero"),
    Edit("memory: 22 GiB", "memory: lots", "'lots' is not a quantity"),
    Edit(
        "bandwidth: 100 Gbit/s",
        "bandwidth: -100 Gbit/s",
        "lab.yaml:7: node.nic.bandwidth: '-100 Gbit/s' must be",
    ),
    Edit("bandwidth: 100 Gbit/s", "bandwidth: 100", "lab.yaml:7: node.nic.bandwidth: '100' has no unit"),
    Edit("bandwidth: 100 Gbit/s", "bandwidth: 1e400 Gbit/s", "must be a finite quantity"),
    Edit(
        "bandwidth: 100 Gbit/s",
        "bandwidth: .nan",
        "lab.yaml:7: node.nic.bandwidth: .nan is not a finite number",
    ),
    Edit("bandwidth: 100 Gbit/s", "bandwidth: [1]", "expected a single value, got a list"),
    Edit("latency: 20 us", "latency: 20 GB", "unknown unit 'GB' for seconds"),
    Edit("latency: 20 us", "latency: 20 us, latency: 20 us", "given twice"),
    Edit(
        "latency: 20 us", "latncy: 20 us", "lab.yaml:7: node.nic.latncy: unknown key; did you mean 'latency'?"
    ),
    Edit("kind: ethernet,", "kind: 5,", "expected text, got the number 5"),
    Edit("base: ethernet", "base: ethernett", "lab.yaml:10: fabric.base: unknown fabric 'ethernett'"),
    Edit("oversubscription: 1", "oversubscription: 0.5", "fabric.oversubscription: must be at least 1"),
    Edit("oversubscription: 1", "oversubscription: .inf", "is not a finite number"),
    Edit("count: 1", "count: many", "lab.yaml:9: count: expected a whole number"),
    Edit("id: lab\n", "id: lab\nnodes: 4\n", "lab.yaml:3: nodes: unknown key"),
    Edit("  num_gpus: 8", "  topology: torus", "unknown topology 'torus'"),
    Edit("node:\n", "node:\nnode:\n", "lab.yaml:4: node: given twice"),
]

BROKEN_CONFIGS = {
    "not JSON": ("{", "config.json:1:2: not valid JSON"),
    "empty": ("", "config.json: is empty"),
    "a list": ("[]", "holds a list, not an object"),
    "no model_type": ({"model_type": None}, "required key 'model_type' is missing"),
    "unknown model_type": ({"model_type": "llamma"}, "unknown model_type 'llamma'; did you mean 'llama'?"),
    "no layers": ({"num_hidden_layers": None}, "required key 'num_hidden_layers' is missing"),
    "negative layers": ({"num_hidden_layers": -4}, "num_hidden_layers must be an integer from 1"),
    "dimensions beyond any model": ({"hidden_size": 2**40, "head_dim": 64}, "hidden_size must be at most"),
    "text for a number": ({"hidden_size": "512"}, "hidden_size must be an integer from 1"),
    "a fraction": ({"vocab_size": 1000.5}, "vocab_size must be an integer from 1"),
    "heads that do not divide": ({"num_attention_heads": 7}, "hidden_size 512 does not divide into 7 heads"),
    "key/value heads that do not divide": (
        {"num_key_value_heads": 3},
        "must be a multiple of num_query_groups 3",
    ),
    "a list for a flag": ({"tie_word_embeddings": [True]}, "tie_word_embeddings must be true or false"),
    "NaN": ('{"model_type": NaN}', "NaN is not a finite number"),
    "a key twice": ('{"vocab_size": 1, "vocab_size": 2}', "key 'vocab_size' appears twice"),
    "3,000 levels": ('{"a":' * 3000 + "1" + "}" * 3000, "config.json"),
    "binary": ("\0\1\2", "is binary, not UTF-8 text"),
}

PLAN_EDITS = [
    Edit("kind: training_plan", "kind: training", "expected a plan file (kind: training_plan), not training"),
    Edit(
        "schema_version: 1", "schema_version: 9", "plan.yaml:1: schema_version: this release reads version 1"
    ),
    Edit("  dp: 4", "  dp: 0", "plan.yaml:5: plan.dp: must be at least 1, not 0"),
    Edit("  dp: 4", "  dp: 400", "needs tp x cp x dp x pp = 800 GPUs, but the cluster has 8"),
    Edit("  dp: 4", "  dp: 3", "global_batch_size 16 is not a multiple of dp x micro_batch_size"),
    Edit("  dp: 4", "  dp: four", "plan.yaml:5: plan.dp: expected a whole number"),
    Edit("  tp: 2", "  tp: 1", "plan.sequence_parallel needs tp > 1"),
    Edit("  etp: 1", "  ettp: 1", "plan.ettp: unknown key; did you mean 'etp'?"),
    Edit("  vpp: 1", "  vpp: 2", "plan.layers_per_stage names 1 virtual stages, but pp x vpp"),
    Edit("  pp: 1", "  pp: 2", "plan.layers_per_stage names 1 virtual stages, but pp x vpp is 2 x 1"),
    Edit("  schedule: none", "  schedule: 1f1b", "plan.schedule '1f1b' does not go with pp 1"),
    Edit("  schedule: none", "  schedule: 3f1b", "unknown schedule '3f1b'; did you mean '1f1b'?"),
    Edit("  sharding: zero1", "  sharding: zero9", "unknown sharding 'zero9'"),
    Edit(
        "  sharding: zero1", "  sharding: hsdp\n  sharding_group: 3", "plan.sharding_group 3 must divide dp 4"
    ),
    Edit("  - 16\n", "  - 15\n", "layers_per_stage adds up to 15, but the model has 16 layers"),
    Edit("  - 16\n", "  - -16\n", "a stage cannot hold a negative number of layers"),
    Edit("num_layers: 16", "num_layers: 0", "model.num_layers: must be at least 1"),
    Edit("num_attention_heads: 32", "num_attention_heads: 31", "num_attention_heads"),
    Edit("precision: bf16", "precision: bf61", "unknown precision 'bf61'; did you mean 'bf16'?"),
    Edit("software: megatron-core", "software: megatron", "unknown software 'megatron'; did you mean"),
    Edit("value: 300 GB/s", "value: 300 GB", "unknown unit 'GB' for bytes per second"),
    Edit("value: 22.05 GiB", "value: -22.05 GiB", "must be a finite quantity, not negative"),
    Edit("origin:", "extra: 1\norigin:", "extra: unknown key"),
]

CALIBRATION_EDITS = [
    Edit("schema_version: 2\n", "", "schema_version: is required but missing"),
    Edit("schema_version: 2", "schema_version: 1", "this release reads version 2, not 1; calibrate again"),
    Edit("kind: calibration\n", "", "is not a calibration (kind: calibration is missing)"),
    Edit("gpu: l4", "gpu: [l4]", "mine.yaml:3: gpu: expected a single value"),
    Edit("operators:", "operatos:", "operatos: unknown key; did you mean 'operators'?"),
    Edit("  all_gather:", "  all_gathr:", "collectives.all_gathr: unknown key; did you mean 'all_gather'?"),
    Edit("latency: ", "latency: -", "must be a finite quantity, not negative"),
    Edit("  flash_2:", "  flash_9:", "attention.flash_9: unknown key; did you mean 'flash_"),
    Edit(
        "sustained_clock:\n  bf16:",
        "sustained_clock:\n  bf17:",
        "sustained_clock.bf17: unknown key; did you mean",
    ),
    Edit("memory_efficiency: ", "memory_efficiency: -", "memory_efficiency: must be above zero"),
    Edit("launch_time: ", "launch_time: 1 parsec # ", "unknown unit 'parsec' for seconds"),
]

HEADER = "id,source,model,gpu,n_gpus,seq_len,micro_batch,global_batch,measured,measured_seconds"
ROW = "run-1,paper,llama-3-8b,H100-80GB-SXM,8,8192,1,8,time,1.5"
BAD_TABLES = {
    "an unknown column": (f"{HEADER},tpp\n{ROW},1\n", "runs.csv:1: unknown column 'tpp'; did you mean"),
    "a missing column": (
        f"{HEADER[3:]}\n{ROW}\n",
        "runs.csv:1: not a table of measured training runs: column(s) id",
    ),
    "too few cells": (f"{HEADER}\n{ROW}\nrun-2,paper\n", "runs.csv:3: the row has more or fewer cells"),
    "too many cells": (f"{HEADER}\n{ROW},1,2\n", "runs.csv:2: the row has more or fewer cells"),
    "text for seconds": (
        f"{HEADER}\n{ROW[:-3]}fast\n",
        "runs.csv:2: measured_seconds: 'fast' is not a number",
    ),
    "negative seconds": (
        f"{HEADER}\n{ROW[:-3]}-1.5\n",
        "runs.csv:2: measured_seconds must be a finite number",
    ),
    "NaN seconds": (f"{HEADER}\n{ROW[:-3]}nan\n", "runs.csv:2: measured_seconds must be a finite number"),
    "an open quote": (f'{HEADER}\n"{ROW}\n', "is not a CSV table"),
    "empty": ("", "runs.csv:1: not a table of measured training runs"),
    "a job file": ("schema_version: 1\nkind: training\n", "runs.csv:1: unknown column"),
    "binary": (b"\xff\xfe\x00\x01", "runs.csv: is not UTF-8 text"),
}

BAD_FLAGS = {
    "unknown model": ({"--model": "llama-3.2-2b"}, "unknown model 'llama-3.2-2b'; did you mean"),
    "model of experts": ({"--model": "qwen3-30b-a3c"}, "did you mean 'qwen3-30b-a3b'?"),
    "missing config": ({"--model": "./config.json"}, "config.json: cannot be read: No such file"),
    "empty model": ({"--model": ""}, "unknown model ''"),
    "no model": ({"--model": None}, "no model: name a preset or a config.json with --model"),
    "unknown cluster": ({"--cluster": "l4-9:1"}, "unknown node 'l4-9'"),
    "no nodes": ({"--cluster": "l4-8:0"}, "the number of nodes is '0'"),
    "negative nodes": ({"--cluster": "l4-8:-1"}, "the number of nodes is '-1'"),
    "no cluster": ({"--cluster": None}, "no cluster: name one as --cluster"),
    "empty cluster": ({"--cluster": ""}, "unknown cluster ''"),
    "batch of zero": ({"--global-batch-size": "0"}, "Invalid value for '--global-batch-size'"),
    "batch beyond every machine": ({"--global-batch-size": "9" * 30}, "global_batch_size"),
    "text for a batch": ({"--global-batch-size": "many"}, "Invalid value for '--global-batch-size'"),
    "no batch": ({"--global-batch-size": None}, "no global batch size: give --global-batch-size"),
    "length beyond every machine": ({"--sequence-length": "9" * 30}, "sequence_length"),
    "no length": ({"--sequence-length": None}, "no sequence length: give --sequence-length"),
    "unknown precision": ({"--precision": "fp7"}, "unknown precision 'fp7'"),
    "absent units": ({"--precision": "mxfp8"}, "l4 has no mxfp8 units"),
    "unknown software": ({"--software": "megatron-5"}, "unknown software 'megatron-5'"),
    "unknown objective": (
        {"--objective": "profit"},
        "unknown value 'profit'; known: throughput, cost, energy",
    ),
    "unknown target": ({"--target": "vlm"}, "unknown target 'vlm'"),
    "top of zero": ({"--top": "0"}, "Invalid value for '--top'"),
    "unknown flag": ({"--tpo": "3"}, "No such option '--tpo'"),
    "unknown convention": ({"--flops": "half"}, "Invalid value for '--flops'"),
    "missing calibration": ({"--calibration": "none.yaml"}, "none.yaml: no such file"),
}


def check(outcome, folder, before, says, code=2):
    """Hold one outcome to the contract: its code, one message, no traceback, nothing on stdout or on disk."""
    assert outcome.code == code, outcome
    assert outcome.stdout == ""
    # On a loaded machine progress comes first.
    complaint = re.sub(r"\A([a-z ]+: [0-9,]+( of [0-9,]+)?\n)*", "", outcome.stderr)
    assert complaint.startswith("error: ")
    assert complaint.count("error:") == 1
    assert "Traceback" not in complaint
    assert says in complaint
    assert {path.name for path in folder.iterdir()} == before


def edited(text, edit):
    assert edit.old in text, f"the text to change is gone: {edit.old!r}"
    return text.replace(edit.old, edit.new, 1)


def planned(changes):
    flags = {**FLAGS, **changes}
    return ("plan", *(word for flag, value in flags.items() if value is not None for word in (flag, value)))


def names(edits):
    return [f"{edit.old.strip()[:30]} -> {edit.new.strip()[:30]}" for edit in edits]


@pytest.mark.parametrize("edit", JOB_EDITS, ids=names(JOB_EDITS))
def test_a_mistake_in_a_job_file(meshwright, folder, job_text, edit):
    (folder / "job.yaml").write_text(edited(job_text, edit))
    check(meshwright("plan", "job.yaml", "--out", "out"), folder, {"job.yaml"}, edit.says)


@pytest.mark.parametrize("name", WHOLE_JOBS)
def test_a_file_that_is_no_job(meshwright, folder, name):
    content, says = WHOLE_JOBS[name]
    (folder / "job.yaml").write_bytes(content)
    check(meshwright("plan", "job.yaml", "--out", "out"), folder, {"job.yaml"}, says)


@pytest.mark.parametrize("command", [("plan",), ("simulate",), ("validate",), ("export", "--to", "megatron")])
@pytest.mark.parametrize(
    ("path", "says"),
    [(".", "is a directory"), ("nowhere.yaml", "no such file"), ("/dev/null/x", "/dev/null/x")],
)
def test_a_path_that_is_no_file(meshwright, folder, command, path, says):
    extra = () if command == ("validate",) else ("--out", "out")
    check(meshwright(*command, path, *extra), folder, set(), says)


@pytest.mark.parametrize("edit", CLUSTER_EDITS, ids=names(CLUSTER_EDITS))
def test_a_mistake_in_a_cluster_file(meshwright, folder, edit):
    (folder / "lab.yaml").write_text(edited(CLUSTER, edit))
    check(meshwright(*planned({"--cluster": "lab.yaml"})), folder, {"lab.yaml"}, edit.says)


def test_the_cluster_file_without_a_mistake_is_planned(meshwright, folder):
    (folder / "lab.yaml").write_text(CLUSTER)
    assert meshwright(*planned({"--cluster": "lab.yaml", "--top": "1"})).code == 0


@pytest.mark.parametrize("name", BROKEN_CONFIGS)
def test_a_broken_config_json(meshwright, folder, name):
    content, says = BROKEN_CONFIGS[name]
    text = content if isinstance(content, str) else json.dumps({**CONFIG, **content})
    (folder / "config.json").write_text(text)
    check(meshwright(*planned({"--model": "./config.json"})), folder, {"config.json"}, says)


def test_the_config_json_without_a_mistake_is_planned(meshwright, folder):
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert meshwright(*planned({"--model": "./config.json", "--top": "1"})).code == 0


@pytest.mark.parametrize(
    "command", [("simulate",), ("export", "--to", "megatron")], ids=["simulate", "export"]
)
@pytest.mark.parametrize("edit", PLAN_EDITS, ids=names(PLAN_EDITS))
def test_a_mistake_in_a_plan_file(meshwright, plan_file, folder, command, edit):
    plan_file.write_text(edited(plan_file.read_text(), edit))
    check(meshwright(*command, plan_file, "--out", "out"), folder, {"plan.yaml"}, edit.says)


@pytest.mark.parametrize("edit", CALIBRATION_EDITS, ids=names(CALIBRATION_EDITS))
def test_a_mistake_in_a_calibration(meshwright, plans, folder, edit):
    built_in = files("meshwright.hardware_specs") / "calibrations" / "mi300x.yaml"
    (folder / "mine.yaml").write_text(edited(built_in.read_text().replace("gpu: mi300x", "gpu: l4"), edit))
    outcome = meshwright("simulate", plans / "1.yaml", "--calibration", "mine.yaml", "--out", "out")
    check(outcome, folder, {"mine.yaml"}, edit.says)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_file_that_is_no_table_of_runs(meshwright, folder, name):
    content, says = BAD_TABLES[name]
    (folder / "runs.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    check(meshwright("validate", "runs.csv", "--out", "results.csv"), folder, {"runs.csv"}, says)


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_a_mistake_in_the_flags(meshwright, folder, name):
    changes, says = BAD_FLAGS[name]
    check(meshwright(*planned(changes)), folder, set(), says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plna",), "no such command 'plna'; did you mean 'plan'?"),
        (("specs", "show"), "Missing argument 'NAME'"),
        (("specs", "lst"), "No such command 'lst'"),
        (("export", "p.yaml"), "Missing option"),
        (("plan", "a.yaml", "b.yaml"), "unexpected extra argument"),
        (("specs", "list", "--kind", "cpu"), "Invalid value for '--kind'"),
    ],
)
def test_a_mistake_in_the_command_line(meshwright, folder, words, says):
    check(meshwright(*words), folder, set(), says)


@pytest.mark.parametrize("inside", ["", "/deeper"])
def test_a_file_where_the_output_folder_should_be(meshwright, job, folder, inside):
    check(meshwright("plan", job, "--out", f"job.yaml{inside}"), folder, {"job.yaml"}, "job.yaml")


def test_a_link_where_a_plan_should_be_is_never_followed(meshwright, job, folder):
    (folder / "out").mkdir()
    (folder / "out" / "1.yaml").symlink_to(job)
    outcome = meshwright("plan", job, "--out", "out", "--force")
    check(outcome, folder, {"job.yaml", "out"}, "is a symbolic link, which is never followed or replaced")


INFEASIBLE = {
    "too large a model": (
        {"--model": "llama-3-70b"},
        ("rejected by memory (the fullest rank fits)", "nearest: fits on", "GPUs"),
    ),
    "far too large a model": ({"--model": "gpt-1t"}, ("rejected by memory", "nearest:")),
    "a target that refuses all": (
        {"--software": "torchtitan", "--precision": "fp8", "--target": "torchtitan"},
        ("nearest: fits without target torchtitan, which says of most plans: precision 'fp8' has one scale",),
    ),
}


@pytest.mark.parametrize("name", INFEASIBLE)
def test_a_job_without_a_feasible_plan(meshwright, folder, name):
    changes, says = INFEASIBLE[name]
    outcome = meshwright(*planned(changes))
    for words in says:
        check(outcome, folder, set(), words, code=3)


def test_an_infeasible_constraint_is_named_as_the_nearest_relaxation(meshwright, folder, job_text):
    (folder / "job.yaml").write_text(job_text.replace("tp: [1, 2]", "tp: 3"))
    outcome = meshwright("plan", "job.yaml")
    check(outcome, folder, {"job.yaml"}, "nearest: fits without 'constraints.tp: 3'", code=3)
    assert "rejected by user_limits" in outcome.stderr


TINY = """\
schema_version: 1
kind: training
model: llama-3.2-1b
cluster: l4-8:1
workload: {global_batch_size: 8, sequence_length: 256}
constraints: {tp: 1, pp: 1, micro_batch_size: 1, recompute: none, sharding: zero1}
"""
_places = st.integers(0, len(TINY) - 1)
_changes = st.one_of(
    st.tuples(st.just("replace"), _places, st.integers(0, 255)),
    st.tuples(st.just("insert"), _places, st.integers(0, 255)),
    st.tuples(st.just("delete"), _places, st.integers(1, 12)),
    st.tuples(st.just("repeat"), _places, st.integers(1, 40)),
)


def mutated(changes):
    content = bytearray(TINY.encode())
    for kind, place, value in changes:
        position = min(place, len(content))
        if kind == "replace":
            content[position : position + 1] = bytes([value])
        elif kind == "insert":
            content[position:position] = bytes([value])
        elif kind == "delete":
            del content[position : position + value]
        else:
            content[position:position] = content[position : position + value]
    return bytes(content)


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(changes=st.lists(_changes, min_size=1, max_size=4))
def test_any_change_of_bytes_ends_in_a_plan_or_in_one_message(meshwright, folder, changes):
    (folder / "job.yaml").write_bytes(mutated(changes))
    outcome = meshwright("plan", "job.yaml", "--top", 1, "--quiet")
    assert outcome.code in (0, 2, 3)
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.count("error:") == (0 if outcome.code == 0 else 1)
