from __future__ import annotations

import json
from importlib.resources import files

import pytest

BUILT_IN = files("meshwright.hardware_specs") / "calibrations"
NAMES = sorted(
    entry.name.removesuffix(".yaml") for entry in BUILT_IN.iterdir() if entry.name.endswith(".yaml")
)


def test_the_list_names_every_device_its_kernels_and_error(meshwright):
    outcome = meshwright("calibrations", "list")
    assert (outcome.code, outcome.stderr) == (0, "")
    for name in NAMES:
        assert name in outcome.stdout
    line = next(line for line in outcome.stdout.splitlines() if "h200-sxm-141" in line)
    assert "vllm 0.24.0" in line
    assert "%" in line
    assert "estimate" in next(line for line in outcome.stdout.splitlines() if "mi300x" in line)


def test_the_list_as_json_names_engines_and_reasons(meshwright):
    outcome = meshwright("calibrations", "list", "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    listed = json.loads(outcome.stdout)
    assert (listed["schema_version"], listed["kind"]) == (1, "calibrations")
    assert sorted(listed["calibrations"]) == NAMES
    assert listed["calibrations"]["a100-sxm-80"]["engines"] == ["sglang"]
    assert listed["calibrations"]["mi300x"]["engines"] == []
    assert listed["calibrations"]["mi300x"]["reason"].startswith("estimate")


def test_a_device_is_shown_with_errors_collectives_constants_and_provenance(meshwright):
    outcome = meshwright("calibrations", "show", "h200-sxm-141")
    assert (outcome.code, outcome.stderr) == (0, "")
    for part in (
        "gemm.bf16",
        "attention_decode.bf16",
        "moe.bf16",
        "mean error",
        "radial basis functions",
        "trees",
        "all_reduce: 2, 4, 8 ranks",
        "sustained clock bf16: 0.900 of burst",
        "memory stream: 85 % of peak",
        "attention flash_3:",
        "attention backward: 0.75",
        "Apache-2.0",
        "rows, sha256 ",
    ):
        assert part in outcome.stdout
    # Experts have a residual too.
    assert not [
        line for line in outcome.stdout.splitlines() if "moe." in line and line.rstrip().endswith("none")
    ]


def test_an_alias_shows_the_device(meshwright):
    assert meshwright("calibrations", "show", "h100") == meshwright("calibrations", "show", "h100-sxm-80")


def test_a_device_as_json_gives_errors_and_no_fitted_arrays(meshwright):
    outcome = meshwright("calibrations", "show", "h200-sxm-141", "--json")
    shown = json.loads(outcome.stdout)
    assert (shown["schema_version"], shown["kind"]) == (1, "calibration")
    by_hand, fitted = shown["documents"]
    assert by_hand["sustained_clock"] == {"bf16": 0.9, "fp8": 1.15}
    model = fitted["operators"]["gemm.bf16"]
    assert 0.0 < model["error"]["mean"] < model["error"]["roofline"] < 0.3
    assert set(model["intervals"]) == {"launch", "memory", "compute"}
    assert fitted["collectives"]["all_reduce"]["ranks"] == [2.0, 4.0, 8.0]
    assert fitted["provenance"]["licence"] == "Apache-2.0"
    assert len(outcome.stdout) < 50_000


@pytest.mark.parametrize("name", ["mi300x", "cpu-host"])
def test_an_estimate_says_so(meshwright, name):
    assert "estimate" in meshwright("calibrations", "show", name).stdout


def test_a_file_is_shown_like_a_device(meshwright, folder):
    (folder / "mine.yaml").write_text((BUILT_IN / "l40s.yaml").read_text())
    outcome = meshwright("calibrations", "show", "mine.yaml")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert "mine: l40s" in outcome.stdout
    (folder / "fitted.json").write_text((BUILT_IN / "l40s.vllm.json").read_text())
    shown = json.loads(meshwright("calibrations", "show", "fitted.json", "--json").stdout)
    assert [document["name"] for document in shown["documents"]] == ["fitted"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h20O-sxm-141", "no device or calibration file 'h20O-sxm-141'; did you mean 'h200-sxm-141'?"),
        ("nothing-like-it", "Built-in calibrations: a100-sxm-80,"),
        (
            "rtx-4090",
            "rtx-4090 has no calibration of its own: uncalibrated: no calibration of rtx-4090; borrows that of l40s",
        ),
        ("none.json", "none.json: no such file"),
        ("none.yaml", "none.yaml: no such file"),
    ],
)
def test_an_unknown_name_is_refused_with_what_there_is(meshwright, name, says):
    outcome = meshwright("calibrations", "show", name)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("error: ")
    assert says in outcome.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "mine.json:1: not valid JSON: the file ends too early; it is truncated"),
        ('{"model_type": "llama"}', "mine.json: is not a calibration (kind: calibration is missing)"),
        (
            '{"kind": "calibration", "schema_version": 3}',
            "this release reads version 2, not 3; calibrate again",
        ),
        ('{"kind": "calibration", "schema_version": 2, "gpu": "h300"}', "unknown GPU 'h300'"),
        ('{"kind": "calibration", "schema_version": 2}', "mine.json: gpu: is required but missing"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(meshwright, folder, content, says):
    (folder / "mine.json").write_text(content)
    outcome = meshwright("calibrations", "show", "mine.json")
    assert (outcome.code, outcome.stdout) == (2, "")
    assert says in outcome.stderr


def test_a_profile_is_no_calibration_yet(meshwright, tmp_path):
    outcome = meshwright("calibrations", "show", tmp_path / "mine.jsonl")
    assert outcome.code == 2
    assert "is a profile; 'meshwright calibrate" in outcome.stderr
