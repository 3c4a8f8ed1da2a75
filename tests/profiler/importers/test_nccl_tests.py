from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.profiler.importers.nccl_tests import read_nccl_tests
from meshwright.profiler.measurements import CollectiveSamples

H100 = "NVIDIA H100 80GB HBM3"
LEAD = "#       size         count      type   redop    root  "
HALF = "   time   algbw   busbw  #wrong  "
HEADER = (
    f"#\n#{'out-of-place':>72}{'in-place':>36}\n{LEAD}{HALF}{HALF}\n"
    "#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)\n"
)
FOOTER = "# Out of bounds values : 0 OK\n# Avg bus bandwidth    : 123.4 \n#\n"
ROWS = (
    "        1024           256     float     sum      -1    20.00    0.05    0.09       0    30.00    0.03    0.06       0\n"
    "     1048576        262144     float     sum      -1    40.00   26.21   45.87       0    50.00   20.97   36.70       0\n"
    "  1073741824     268435456     float     sum      -1   4000.0  268.44  469.76     N/A   4100.0  261.89  458.31     N/A\n"
)


def ranks(count: int = 8, device: str = H100, host: str = "node1", start: int = 0) -> str:
    return "".join(
        f"#  Rank {rank:2d} Group  0 Pid {4000 + rank:6d} on {host:>10s} device {rank:2d} [0000:{rank:02x}:00] {device}\n"
        for rank in range(start, start + count)
    )


def run(rows: str = ROWS, *, devices: str | None = None, header: str = HEADER, program: str = "") -> str:
    starting = f"# Collective test starting: {program}\n" if program else ""
    first = (
        "# nThread 1 nGpus 8 minBytes 8 maxBytes 1073741824 step: 2(factor) warmup iters: 5 iters: 20 \n#\n"
    )
    return (
        starting
        + first
        + "# Using devices\n"
        + (ranks() if devices is None else devices)
        + header
        + rows
        + FOOTER
    )


def read(
    folder: Path, text: str, name: str = "all_reduce.log", gpu: str = "h100-sxm-80"
) -> Sequence[CollectiveSamples]:
    (folder / name).write_text(text, encoding="utf-8")
    return read_nccl_tests([folder / name], gpu).collectives


def fault(folder: Path, text: str, name: str = "all_reduce.log", gpu: str = "h100-sxm-80") -> str:
    with pytest.raises(SpecError) as caught:
        read(folder, text, name, gpu)
    return str(caught.value).replace(f"{folder}/", "")


def scaled(factor: float, redop: str = "none") -> str:
    """Rows whose bus bandwidth is a factor of the algorithm bandwidth, 100 GB/s."""
    return "".join(
        f"{size:12d}  {size // 4:12d}     float  {redop:>6s}      -1  {size / 1e5:7.1f}  100.00  {100 * factor:6.2f}       0"
        f"  {size / 1e5:7.1f}  100.00  {100 * factor:6.2f}       0\n"
        for size in (1 << 20, 1 << 24)
    )


def test_a_log_gives_sizes_in_bytes_and_out_of_place_times_in_seconds(tmp_path: Path) -> None:
    (curve,) = read(tmp_path, run())
    assert (curve.collective, curve.ranks, curve.source) == ("all_reduce", 8, "nccl-tests log all_reduce.log")
    np.testing.assert_allclose(curve.num_bytes, [1024, 2**20, 2**30])
    np.testing.assert_allclose(curve.seconds, [20e-6, 40e-6, 4000e-6])


def test_inputs_carry_digest_and_rows_and_the_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "all_reduce.log"
    path.write_text("NCCL version 2.20.5+cuda12.4\n" + run())
    measured = read_nccl_tests([path], "h100-sxm-80")
    assert measured.inputs == ((path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 3),)
    assert (measured.gpu, measured.kernels) == ("h100-sxm-80", "nccl 2.20.5")
    path.write_text("# nccl-tests version 2.17.6 nccl-headers=22807 nccl-library=22808\n" + run())
    assert read_nccl_tests([path], "h100-sxm-80").kernels == "nccl 2.28.8"


def test_the_layout_of_version_2_0_has_neither_root_nor_group_and_an_error_column(tmp_path: Path) -> None:
    half = "   time   algbw   busbw  error  "
    header = f"#\n#       size         count    type   redop  {half}{half}\n"
    devices = "".join(
        f"#   Rank {rank:2d} Pid   77 on  old device {rank:2d} [0x0{rank}] Tesla V100\n" for rank in range(4)
    )
    rows = "     1048576        262144   float     sum    50.00   20.97   31.46  4e-07    60.00   17.48   26.21  4e-07\n"
    text = run(rows, devices=devices, header=header).replace("nGpus 8", "nGpus 4")
    (curve,) = read(tmp_path, text, gpu="v100-sxm2-32")
    assert curve.ranks == 4
    np.testing.assert_allclose(curve.seconds, [50e-6])


def test_a_blank_operation_shifts_no_column(tmp_path: Path) -> None:
    (curve,) = read(tmp_path, run(scaled(7 / 8, redop="")), "all-gather_8.txt")
    assert curve.collective == "all_gather"
    np.testing.assert_allclose(curve.seconds, curve.num_bytes / 100e9, rtol=1e-2)


@pytest.mark.parametrize(
    ("program", "collective", "factor"),
    [
        ("all_reduce_perf", "all_reduce", 7 / 4),
        ("all_gather_perf_mpi", "all_gather", 7 / 8),
        ("reduce_scatter_perf", "reduce_scatter", 7 / 8),
        ("alltoall_perf", "all_to_all", 7 / 8),
        ("broadcast_perf", "broadcast", 1.0),
        ("sendrecv_perf", "send", 1.0),
    ],
)
def test_the_program_names_the_collective(
    tmp_path: Path, program: str, collective: str, factor: float
) -> None:
    (curve,) = read(tmp_path, run(scaled(factor), program=program), "all_reduce_by_mistake.log")
    assert curve.collective == collective


def test_a_nameless_log_is_of_an_all_reduce_where_the_bus_factor_says_so(tmp_path: Path) -> None:
    (curve,) = read(tmp_path, run(), "monday.log")
    assert curve.collective == "all_reduce"


def test_in_place_times_stand_in_where_out_of_place_ones_are_not_there(tmp_path: Path) -> None:
    row = "     1048576        262144     float     sum      -1      N/A     N/A     N/A     N/A    50.00   20.97   36.70       0\n"
    (curve,) = read(tmp_path, run(row))
    np.testing.assert_allclose(curve.seconds, [50e-6])
    header = f"#\n{LEAD}{HALF}\n"  # rccl-tests -O 0
    row = "     1048576        262144     float     sum      -1    50.00   20.97   36.70       0\n"
    (curve,) = read(tmp_path, run(row, header=header))
    np.testing.assert_allclose(curve.seconds, [50e-6])


def test_rows_of_no_bytes_of_no_time_or_with_wrong_results_are_dropped(tmp_path: Path) -> None:
    rows = (
        "           0             0     float     sum      -1    20.00    0.00    0.00       0    20.00    0.00    0.00       0\n"
        "        2048           512     float     sum      -1     0.00    0.00    0.00       0     0.00    0.00    0.00       0\n"
        "        4096          1024     float     sum      -1    20.00    0.20    0.36       7    20.00    0.20    0.36       0\n"
    )
    (curve,) = read(tmp_path, run(rows + ROWS))
    np.testing.assert_allclose(curve.num_bytes, [1024, 2**20, 2**30])
    # The star of old rccl-tests marks an error beyond its threshold.
    rows += ROWS.splitlines(keepends=True)[0].rstrip("0\n") + "1e-02*\n"
    expected = "all_reduce.log:1: none of 4 rows is usable: no bytes, no time or wrong results; run it again"
    assert fault(tmp_path, run(rows)) == expected


def test_what_libraries_and_launchers_print_in_between_is_passed_over(tmp_path: Path) -> None:
    first, *others = ROWS.splitlines(keepends=True)
    torn = "     2097152        524288     float     sum      -1    60.00   34.95   node1:77:77 [0] NCCL INFO Channel 00\n"
    text = run(
        "node1:77:77 [0] NCCL INFO comm 0x1 rank 0\n" + first + torn + "".join(others) + "     4194304\n"
    )
    tagged = "".join(f"    [1,0]<stdout>:{line}\n" for line in text.splitlines())
    for each in (text, tagged, text.replace("# Using devices\n", "rccl-tests: Version develop:1a2b3c\n")):
        (curve,) = read(tmp_path, each)
        assert len(curve.seconds) == 3


def test_per_iteration_columns_and_time_stamps_are_passed_over(tmp_path: Path) -> None:
    half, extra = HALF.rstrip(), "  i_min   i_max   i_p99   i_cv%"
    header = f"#\n{LEAD}{half}{extra}{half}{extra}           timestamp\n"
    block = "20.00   52.43   91.75       0    19.00   25.00   25.00    3.10   "
    row = f"     1048576        262144     float     sum      -1    {block}{block} 2026-03-01 10:11:12\n"
    (curve,) = read(tmp_path, run(row, header=header))
    np.testing.assert_allclose(curve.seconds, [20e-6])


def test_runs_of_one_collective_and_size_are_put_together(tmp_path: Path) -> None:
    both = run(program="all_reduce_perf") + run(scaled(7 / 8), program="all_gather_perf")
    (tmp_path / "a.log").write_text(both)
    (tmp_path / "b.log").write_text(run(scaled(7 / 4, "sum"), program="all_reduce_perf"))
    measured = read_nccl_tests([tmp_path / "a.log", tmp_path / "b.log"], "h100-sxm-80")
    curves = [(each.collective, len(each.seconds), each.source) for each in measured.collectives]
    assert curves == [
        ("all_gather", 2, "nccl-tests log a.log"),
        ("all_reduce", 5, "nccl-tests log a.log, b.log"),
    ]
    assert [rows for _, _, rows in measured.inputs] == [5, 2]


def test_ranks_are_the_gpus_of_the_threads_where_no_lines_name_them(tmp_path: Path) -> None:
    text = run(scaled(7 / 8), devices="").replace("nThread 1 nGpus 8", "nThread 2 nGpus 4")
    (curve,) = read(tmp_path, text, "reduce_scatter.log")
    assert curve.ranks == 8


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("", "h100-sxm-80"),
    ],
)
def test_a_device_of_the_family_is_accepted(tmp_path: Path, device: str, gpu: str) -> None:
    assert read(tmp_path, run(devices=ranks(device=device)), gpu=gpu)


def test_a_log_of_another_gpu_is_refused(tmp_path: Path) -> None:
    expected = "the log is of 'NVIDIA H100 80GB HBM3', not of h200-sxm-141; give logs of h200-sxm-141, or the id of that GPU"
    assert fault(tmp_path, run(), gpu="h200-sxm-141") == f"all_reduce.log:4: {expected}"
    assert "'NVIDIA L40S', not of l4;" in fault(tmp_path, run(devices=ranks(device="NVIDIA L40S")), gpu="l4")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("hello\n", "x.log", "x.log: no line '# nThread ...'; expected the standard output of nccl-tests or rccl-tests"),
        (run(""), "x.log", "x.log:1: the run has no rows, the log is cut short; expected the standard output"),
        (run(header="", rows=""), "x.log", "x.log:1: the run has no rows, the log is cut short"),
        (run(header=HEADER.replace("time", "cputime")), "x.log", "x.log:14: the log has times of the CPU, not of the"),
        (run(header=HEADER.replace("algbw", "speed")), "x.log", "x.log:14: unknown columns in the header of the table"),
        (run(header=f"{LEAD}\n"), "x.log", "x.log:12: unknown columns in the header of the table"),
        (run(devices=ranks(4) + ranks(4, host="node2", start=4)), "x.log", "x.log:1: the run is of several hosts (node1, node2)"),
        (run(devices=ranks(4) + ranks(4, start=4).replace("Group  0", "Group  1")), "x.log", "is of 2 groups at once; run it"),
        (run(devices=ranks(1)).replace("nGpus 8", "nGpus 1"), "x.log", "x.log:1: the run is of one rank, a curve needs two"),
        (run(program="hypercube_perf"), "x.log", "x.log:2: 'hypercube_perf' is not one of the collectives read: all_reduce,"),
        (run(program="alltoallv_perf"), "x.log", "x.log:2: 'alltoallv_perf' is not one of the collectives read"),
        (run(scaled(7 / 8)), "x.log", "x.log:1: the log does not say which collective it is of; put the collective's name"),
        (run(), "all_reduce_and_allgather.log", "the log does not say which collective it is of"),
        (run(), "allgather.log", "busbw is 1.75 times algbw, which is not all_gather of 8 ranks; name the file after"),
    ],
)  # fmt: skip
def test_a_log_that_gives_no_curve_is_refused(tmp_path: Path, text: str, name: str, message: str) -> None:
    assert message in fault(tmp_path, text, name)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no logs of nccl-tests given; name at least one file"):
        read_nccl_tests([], "h100-sxm-80")
    with pytest.raises(SpecError, match=r"x\.log: cannot be read \(No such file or directory\); name a log"):
        read_nccl_tests([tmp_path / "x.log"], "h100-sxm-80")
    with pytest.raises(SpecError, match=r"cannot be read \(Is a directory\); name a log of nccl-tests"):
        read_nccl_tests([tmp_path], "h100-sxm-80")
