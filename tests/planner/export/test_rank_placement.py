"""Placement files put every rank on the host and the GPU that the mapping wants."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
from export_cases import CASES, MIXTRAL, check_refusal, make_job, make_plan

from meshwright.errors import UnsupportedByTargetError
from meshwright.planner.export import EXPORTERS, write_bundle
from meshwright.planner.export.megatron_arguments import megatron_arguments
from meshwright.simcore.domain.device_mapping import DeviceMapping

SWAPPED = DeviceMapping(host_order=(1, 0), gpu_orders=((7, 6, 5, 4, 3, 2, 1, 0), tuple(range(8))))


def exported(tmp_path, mapping, launcher="torchrun"):
    plan = make_plan(dp=4, tp=4, device_mapping=mapping)
    bundle = EXPORTERS["megatron"].export(make_job(), plan, launcher)
    write_bundle(bundle, tmp_path / "out", force=True)
    return tmp_path / "out"


def place(folder, hosts, tmp_path, **environment):
    (tmp_path / "hosts").write_text(hosts)
    return subprocess.run(
        ["bash", str(folder / "place.sh"), str(tmp_path / "hosts"), str(tmp_path / "placed")],
        env={"PATH": "/usr/bin:/bin"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_host_files_stand_in_the_order_of_the_plan(tmp_path):
    folder = exported(tmp_path, SWAPPED)
    ran = place(folder, "# cluster\nalpha\n\nbeta.example\n", tmp_path, CORES_PER_RANK="4")
    assert ran.returncode == 0, ran.stderr
    written = {path.name: path.read_text().splitlines() for path in (tmp_path / "placed").iterdir()}
    assert written["nodes"] == written["slurm_hosts"] == ["beta.example", "alpha"]
    assert written["hostfile"] == ["beta.example slots=8", "alpha slots=8"]
    assert len(written["rankfile"]) == 16
    assert written["rankfile"][0] == "rank 0=beta.example slot=0-3"
    assert written["rankfile"][9] == "rank 9=alpha slot=4-7"


@pytest.mark.parametrize("hosts", ["alpha\n", "alpha\nb;touch pwned\n", "alpha\n-x\n", "alpha\nb c\n"])
def test_lists_that_name_no_hosts_are_refused(tmp_path, hosts):
    ran = place(exported(tmp_path, SWAPPED), hosts, tmp_path)
    assert ran.returncode == 2
    assert "place.sh:" in ran.stderr
    assert not (tmp_path / "placed").exists()


def test_each_node_sees_its_gpus_in_the_order_of_its_ranks(tmp_path):
    folder = exported(tmp_path, SWAPPED)
    stub = tmp_path / "bin"
    stub.mkdir()
    (stub / "torchrun").write_text('#!/usr/bin/env bash\nprintf "%s" "$CUDA_VISIBLE_DEVICES"\n')
    (stub / "torchrun").chmod(0o755)
    seen = []
    for rank in ("0", "1", "x"):
        ran = subprocess.run(
            ["bash", str(folder / "launch.sh")],
            env={
                "PATH": f"{stub}:/usr/bin:/bin",
                "MEGATRON_PATH": "m",
                "MASTER_ADDR": "a",
                "NODE_RANK": rank,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        seen.append(ran.stdout if ran.returncode == 0 else ran.returncode)
    assert seen == ["7,6,5,4,3,2,1,0", "0,1,2,3,4,5,6,7", 2]


def test_slurm_starts_the_nodes_of_the_plan_on_their_hosts(tmp_path):
    folder = exported(tmp_path, SWAPPED, "slurm")
    stub = tmp_path / "bin"
    stub.mkdir()
    (stub / "scontrol").write_text("#!/usr/bin/env bash\nprintf '%s\\n' node-3 node-5\n")
    (stub / "srun").write_text('#!/usr/bin/env bash\ncat "$SLURM_HOSTFILE"; echo "$MASTER_ADDR $*"\n')
    for path in stub.iterdir():
        path.chmod(0o755)
    ran = subprocess.run(
        ["bash", str(folder / "job.sbatch")],
        env={
            "PATH": f"{stub}:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_NODELIST": "node-[3,5]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "7",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    first, second, command = ran.stdout.splitlines()
    assert (first, second) == ("node-5", "node-3")
    assert command.startswith("node-5 --ntasks=2 --distribution=arbitrary ")


def test_no_mapping_no_files_and_an_identity_on_request(tmp_path):
    plan = make_plan(dp=4, tp=4)
    names = {file.name for file in EXPORTERS["megatron"].export(make_job(), plan, "torchrun").files}
    assert names == {"args.sh", "env.sh", "launch.sh"}
    folder = exported(tmp_path, DeviceMapping())
    assert "HOST_ORDER=(0 1)" in (folder / "placement.sh").read_text()


def test_the_other_rank_order_is_megatrons_flag():
    job, plan = CASES["megatron_placed"][2:]
    words = [word for group in megatron_arguments(job, plan) for word in group.argv]
    assert "--use-tp-pp-dp-mapping" in words
    natural = dataclasses.replace(
        plan, device_mapping=dataclasses.replace(plan.device_mapping, rank_order="tp-cp-ep-dp-pp")
    )
    assert "--use-tp-pp-dp-mapping" not in [w for g in megatron_arguments(job, natural) for w in g.argv]


def test_what_a_target_cannot_place_is_refused():
    other = DeviceMapping(rank_order="tp-cp-ep-pp-dp")
    plan = make_plan(dp=4, pp=4, sharding="zero3", device_mapping=other)
    check_refusal(
        "torchtitan",
        make_job(software="torchtitan"),
        plan,
        ["rank_order 'tp-cp-ep-pp-dp'", "'tp-cp-ep-dp-pp'"],
    )
    experts = make_plan(dp=4, pp=4, ep=4, device_mapping=other)
    check_refusal("megatron", make_job(MIXTRAL), experts, ["rank_order", "ep 4 x etp 1", "tp 1 x cp 1"])
    check_refusal(
        "megatron",
        make_job(),
        make_plan(dp=16, device_mapping=DeviceMapping(host_order=(0, 1, 2))),
        ["names 3 hosts"],
    )
    with pytest.raises(UnsupportedByTargetError, match="host_order"):
        EXPORTERS["megatron"].export(make_job(), make_plan(dp=16, device_mapping=SWAPPED), "kubernetes")
    with pytest.raises(UnsupportedByTargetError, match="google"):
        EXPORTERS["megatron"].export(
            make_job(vendor="google", architecture="tpu"), make_plan(dp=16), "kubernetes"
        )
