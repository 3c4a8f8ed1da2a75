"""Whose calibration a device gets, and what training and serving take of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meshwright.costmodels.calibration_choice import (
    built_in_documents,
    list_calibrations,
    list_engines,
    load_device_calibration,
    read_device_calibrations,
)
from meshwright.costmodels.calibration_document import CalibrationDocument, device_rates
from meshwright.costmodels.calibration_reading import parse_calibration
from meshwright.costmodels.calibration_writing import calibration_text
from meshwright.errors import CalibrationError
from meshwright.hardware_specs.catalog import load_gpu, load_node

H200 = load_gpu("h200-sxm-141")


def test_a_borrowed_calibration_is_priced_against_the_borrower() -> None:
    # A100 SXM's shares of the peaks of A100 PCIe; its clock falls with the power limit.
    lender, borrower = load_gpu("a100-sxm-80"), load_gpu("a100-pcie-80")
    mine, theirs = (load_device_calibration(gpu).gemm("bf16") for gpu in (borrower, lender))
    assert mine.rates == device_rates(borrower, "gemm", "bf16")
    assert mine.rates.bandwidth_bytes_per_second < theirs.rates.bandwidth_bytes_per_second
    assert mine.curve == theirs.curve


def test_copies_are_priced_against_the_link_they_cross() -> None:
    assert (
        device_rates(H200, "copy", "bf16").bandwidth_bytes_per_second
        == H200.memory_bandwidth_bytes_per_second
    )
    assert (
        device_rates(H200, "host_to_device", "bf16").bandwidth_bytes_per_second
        == H200.host_link.bandwidth_bytes_per_second
    )
    assert H200.scale_up is not None
    peer = device_rates(H200, "peer_to_peer", "bf16").bandwidth_bytes_per_second
    assert peer == H200.scale_up.bandwidth_bytes_per_second


def test_on_a_pcie_node_collectives_are_those_of_the_pcie_device() -> None:
    gpu = load_gpu("a100-pcie-80")
    node = load_node("a100-pcie-8")
    assert node.topology == "pcie"
    alone, inside = load_device_calibration(gpu), load_device_calibration(gpu, node)
    measured = load_device_calibration(load_gpu("rtx-pro-6000-server"))
    assert inside.collectives["all_reduce"].latency == measured.collectives["all_reduce"].latency
    assert alone.collectives["all_reduce"].latency != inside.collectives["all_reduce"].latency
    assert "collectives over PCIe as measured on rtx-pro-6000-server" in inside.reason
    assert inside.gemm("bf16").curve == alone.gemm("bf16").curve


def test_training_takes_the_roofline_of_engine_tables_and_serving_the_residual_too() -> None:
    training = load_device_calibration(H200).gemm("bf16")
    serving = built_in_documents(H200.id, H200, "vllm")[-1].operators["gemm.bf16"]
    assert (training.residual, training.box) == (None, None)
    assert serving.residual is not None
    assert training.curve == serving.curve
    assert not {"attention_decode.bf16", "moe.bf16"} & set(load_device_calibration(H200).operators)


def test_a_users_file_keeps_its_residual_and_borrows_what_it_lacks(tmp_path: Path) -> None:
    serving = built_in_documents(H200.id, H200, "vllm")[-1]
    path = tmp_path / "mine.json"
    only = CalibrationDocument(
        name="mine", gpu=H200.id, operators={"gemm.bf16": serving.operators["gemm.bf16"]}
    )
    path.write_text(calibration_text(only))
    own = read_device_calibrations([path], H200)
    assert own.gemm("bf16").residual is not None
    assert (
        own.collectives["all_reduce"].ranks == load_device_calibration(H200).collectives["all_reduce"].ranks
    )
    assert own.reason.startswith(f"given as {path}; what it lacks: built-in calibration of {H200.id}")


@pytest.mark.parametrize("name", [name for name in list_calibrations() if list_engines(name)])
def test_shipped_calibrations_read_back_from_what_they_write(name: str) -> None:
    gpu = load_gpu(name)
    for engine in list_engines(name):
        document = built_in_documents(name, gpu, engine)[-1]
        assert document.provenance.licence == "Apache-2.0"
        assert document.provenance.inputs
        text = calibration_text(document)
        assert calibration_text(parse_calibration(text, f"{document.name}.json", gpu)) == text


def test_an_unknown_built_in_calibration_says_which_there_are() -> None:
    with pytest.raises(CalibrationError, match="no built-in calibration of h300; there are a100-sxm-80, "):
        built_in_documents("h300", H200)


def test_loading_a_built_in_calibration_is_quick() -> None:
    # A process of its own: a loaded document is kept. The best of three, for the machine's load.
    code = (
        "import time\nfrom meshwright.costmodels.calibration_choice import load_device_calibration\n"
        "from meshwright.hardware_specs.catalog import load_gpu\ngpu = load_gpu('h200-sxm-141')\n"
        "start = time.perf_counter()\nload_device_calibration(gpu)\nprint(time.perf_counter() - start)"
    )
    source = str(Path(__file__).resolve().parents[2] / "src")
    taken = [
        float(
            subprocess.run(
                [sys.executable, "-P", "-c", code],
                env={"PYTHONPATH": source},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(taken) < 1.0
