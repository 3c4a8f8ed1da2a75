"""From a log to a calibration file, and from the file to another prediction."""

from __future__ import annotations

import json
import sys

import pytest

RANKS = 2
HEADER = (
    "# nThread 1 nGpus 2 minBytes 1024 maxBytes 1073741824 step: 4(factor) warmup iters: 5 iters: 20\n"
    "# Using devices\n"
    "#  Rank  0 Group  0 Pid   4000 on      node1 device  0 [0000:00:00] NVIDIA L4\n"
    "#  Rank  1 Group  0 Pid   4000 on      node1 device  1 [0000:01:00] NVIDIA L4\n"
    "#\n#       size         count      type   redop    root     time   algbw   busbw  #wrong"
    "     time   algbw   busbw  #wrong\n"
    "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)"
    "             (us)  (GB/s)  (GB/s)\n"
)


def log(bandwidth=1e9, factor=2.0 * (RANKS - 1) / RANKS):
    """An all-reduce log of two ranks at some bytes a second, 20 us at least."""
    rows = []
    for exponent in range(10, 31, 2):
        seconds = 2e-5 + factor * 2**exponent / bandwidth
        rate = 2**exponent / seconds / 1e9
        half = f"{seconds * 1e6:10.2f} {rate:10.4f} {factor * rate:10.4f}       0"
        rows.append(f"{2**exponent:12d} {2**exponent // 4:12d}     float     sum      -1 {half} {half}\n")
    return HEADER + "".join(rows) + "# Out of bounds values : 0 OK\n"


@pytest.fixture
def nccl(meshwright, folder):
    """A calibration of slow collectives, fitted through the command."""
    (folder / "all_reduce.log").write_text(log())
    outcome = meshwright(
        "calibrate", "--from", "nccl-tests", "all_reduce.log", "--gpu", "l4", "--out", "nccl.json"
    )
    assert outcome.code == 0, outcome.stderr
    return folder / "nccl.json"


def test_a_log_becomes_a_calibration_that_says_what_it_holds(meshwright, folder, nccl):
    written = json.loads(nccl.read_text())
    assert (written["schema_version"], written["kind"], written["gpu"]) == (2, "calibration", "l4")
    (row,) = written["collectives"]["all_reduce"]
    assert row["ranks"] == RANKS
    assert len(row["num_bytes"]) == len(row["seconds"]) == 11
    assert written["provenance"]["inputs"][0]["name"] == "all_reduce.log"
    outcome = meshwright("calibrations", "show", "nccl.json")
    assert "all_reduce: 2 ranks, mean error" in outcome.stdout


def test_calibrate_reports_in_text_and_json(meshwright, folder, nccl):
    words = ("calibrate", "--from", "nccl-tests", "all_reduce.log", "--gpu", "l4", "--out", "nccl.json")
    text = meshwright(*words)
    assert "all_reduce: 2 ranks" in text.stdout
    assert text.stdout.endswith("Wrote nccl.json\n")
    shown = json.loads(meshwright(*words, "--json").stdout)
    assert shown["schema_version"] == 1
    assert shown["documents"][0]["collectives"]["all_reduce"]["ranks"] == [2.0]


def test_equal_input_gives_equal_bytes(meshwright, folder, nccl):
    before = nccl.read_bytes()
    meshwright("calibrate", "--from", "nccl-tests", "all_reduce.log", "--gpu", "l4", "--out", "nccl.json")
    assert nccl.read_bytes() == before


def test_a_simulation_uses_the_file_says_why_and_takes_longer(meshwright, plans, nccl):
    plan = next(
        path
        for path in sorted(plans.glob("*.yaml"))
        if all(word in path.read_text() for word in ("tp: 2", "sequence_parallel: false"))
    )
    without, given = (
        json.loads(meshwright("simulate", plan, "--json", *more).stdout)
        for more in ((), ("--calibration", "nccl.json"))
    )
    assert given["calibration"]["id"].endswith("+nccl")
    assert given["calibration"]["reason"].startswith("given as nccl.json; what it lacks: ")
    assert "borrows that of l40s" in given["calibration"]["reason"]
    # 1 GB/s between two GPUs, over PCIe at tens.
    assert (
        given["prediction"]["iteration_time_seconds"] > 1.5 * without["prediction"]["iteration_time_seconds"]
    )


def test_a_search_uses_the_file_and_says_why(meshwright, job, nccl):
    outcome = meshwright("plan", job, "--top", 1, "--calibration", "nccl.json", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "given as nccl.json" in outcome.stdout
    assert json.loads(outcome.stdout)["schema_version"] == 1


def refused(outcome, says, code=2):
    assert (outcome.code, outcome.stdout) == (code, ""), outcome
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("error:") == 1
    assert says in outcome.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--from", "aiconfigurator"), "--system and --engine"),
        (("--from", "aiconfigurator", "--system", "h200_sxm"), "--system and --engine"),
        (("--from", "aiconfigurator", "--engine", "vllm"), "--system and --engine"),
        (
            ("--from", "aiconfigurator", "--system", "h200_sxn", "--engine", "vllm"),
            "did you mean 'h200_sxm'?",
        ),
        (("--from", "aiconfigurator", "--system", "h200_sxm", "--engine", "vlm"), "did you mean 'vllm'?"),
        (("--from", "aiconfigurator", "--system", "h200_sxm", "--engine", "vllm", "a.log"), "no files"),
        (("--from", "nccl-tests", "--gpu", "l4"), "--from nccl-tests needs files to read"),
        (("--from", "nccl-tests", "a.log"), "--from nccl-tests needs --gpu"),
        (("--from", "nccl-tests", "a.log", "--gpu", "l5"), "unknown GPU 'l5'"),
        (
            ("--from", "nccl-tests", "a.log", "--gpu", "l4"),
            "a.log: cannot be read (No such file or directory)",
        ),
        (("--from", "vidur", "a", "b", "--gpu", "l4"), "--from vidur takes one folder"),
        (("--from", "serving-runs", "a.csv", "--software", "vllm"), "--software goes with --from runs"),
        (("--from", "vidurr", "a"), "Invalid value for '--from'"),
    ],
)
def test_missing_and_wrong_options_are_named(meshwright, folder, words, says):
    refused(meshwright("calibrate", *words, "--out", "out.json"), says)
    assert not list(folder.iterdir())


def test_a_calibration_has_to_be_written_somewhere(meshwright):
    refused(meshwright("calibrate", "--from", "nccl-tests", "a.log", "--gpu", "l4"), "Missing option '--out'")


def test_a_missing_package_says_what_to_install(meshwright, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    words = ("calibrate", "--from", "aiconfigurator", "--system", "h200_sxm", "--engine", "vllm")
    refused(meshwright(*words, "--out", "out.json"), "pip install 'meshwright[aiconfigurator]'", code=4)
    assert not list(folder.iterdir())


def test_a_foreign_file_is_replaced_only_by_force(meshwright, folder):
    (folder / "all_reduce.log").write_text(log())
    (folder / "out.json").write_text('{"mine": 1}')
    words = ("calibrate", "--from", "nccl-tests", "all_reduce.log", "--gpu", "l4", "--out", "out.json")
    refused(meshwright(*words), "out.json: exists and was not written by Meshwright")
    assert (folder / "out.json").read_text() == '{"mine": 1}'
    assert meshwright(*words, "--force").code == 0
    assert json.loads((folder / "out.json").read_text())["written_by"] == "meshwright"
    # Now it is ours.
    assert meshwright(*words).code == 0


def test_too_few_sizes_are_an_error_that_says_how_many_more(meshwright, folder):
    lines = log().splitlines(keepends=True)
    (folder / "all_reduce.log").write_text("".join(lines[:11]))
    words = ("calibrate", "--from", "nccl-tests", "all_reduce.log", "--gpu", "l4", "--out", "out.json")
    refused(meshwright(*words), "message sizes are too few; measure", code=4)


def test_a_file_of_another_device_is_refused(meshwright, plans, folder, nccl):
    nccl.write_text(nccl.read_text().replace('"gpu": "l4"', '"gpu": "l40s"'))
    outcome = meshwright("simulate", plans / "1.yaml", "--calibration", "nccl.json")
    refused(outcome, "no given calibration is for l4: the files are for l40s", code=4)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"latency": "', '"latency": "-', "collectives.all_reduce[0].latency: '-"),
        ('"ranks": 2', '"ranks": 1', "collectives.all_reduce[0].ranks: must be at least 2"),
        ('"exponent": ', '"exponet": ', "is 'exponet' meant to be it?"),
        ('"link": ', '"lnk": ', "collectives.link: tables of times need the bandwidth"),
        (
            '"schema_version": 2',
            '"schema_version": 1',
            "this release reads version 2, not 1; calibrate again",
        ),
        ('"seconds": [', '"seconds": [NaN, ', "NaN is not a finite number"),
    ],
)
def test_a_changed_file_is_refused(meshwright, plans, nccl, old, new, says):
    text = nccl.read_text()
    assert old in text
    nccl.write_text(text.replace(old, new, 1))
    refused(meshwright("simulate", plans / "1.yaml", "--calibration", "nccl.json"), says)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(meshwright, plans, nccl, share):
    text = nccl.read_text()
    nccl.write_text(text[: int(share * (len(text) - 2))])
    outcome = meshwright("simulate", plans / "1.yaml", "--calibration", "nccl.json")
    refused(outcome, "the file ends too early; it is truncated")
