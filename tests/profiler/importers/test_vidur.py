from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import SpecError
from meshwright.profiler.importers.vidur import read_vidur
from meshwright.profiler.measurements import Measurements, OperatorSamples

LAYERS = (
    "emb",
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)
STATISTICS = ("min", "max", "mean", "median", "std")
SIZES = (
    "n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size,use_gated_mlp,num_tokens,num_tensor_parallel_workers"
)
# A made-up model: 16 heads of 64, 4 of them for keys, a feed-forward network of 4096, two ranks, 32 tokens.
MODEL = "16,4,1024,4096,32000,True,32,2"
NETWORK = "rank,num_workers,size,collective,devices_per_node,max_devices_per_node"


def layers(*models: str, milliseconds: float = 1.0, without: str = "-") -> str:
    """A table whose medians are 1, 2, 3 ... times a time in the order of the layers."""
    names = [name for name in LAYERS if name != without]
    header = [f"time_stats.{name}.{statistic}" for name in names for statistic in STATISTICS]
    times = [f"0.5,9.0,5.0,{milliseconds * (1 + LAYERS.index(name))},0.1" for name in names]
    return "\n".join([",".join([*header, SIZES]), *(",".join([*times, model]) for model in models), ""])


def network(name: str, *rows: tuple[float, int, int, int]) -> str:
    """A table of rows of median [ms], ranks, bytes and devices per node."""
    header = ",".join(["", *(f"time_stats.{name}.{statistic}" for statistic in STATISTICS), NETWORK])
    lines = [
        f"{i},0.1,9.0,5.0,{t},0.1,0,{n},{size},{name},{per},8" for i, (t, n, size, per) in enumerate(rows)
    ]
    return "\n".join([header, *lines, ""])


def write(folder: Path, **tables: str) -> Path:
    for place, text in tables.items():
        path = folder / f"{place.replace('__', '/')}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def read(folder: Path, gpu: str = "h100-sxm-80", **tables: str) -> Measurements:
    return read_vidur(write(folder, **tables), gpu)


def rows(samples: OperatorSamples) -> dict[tuple[float, ...], float]:
    columns = zip(*samples.shape.values(), strict=True)
    return dict(zip((tuple(map(float, row)) for row in columns), samples.seconds.tolist(), strict=True))


def fault(folder: Path, gpu: str = "h100-sxm-80", **tables: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(folder, gpu, **tables)
    return str(caught.value).replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def test_projections_are_products_of_one_rank_in_seconds(tmp_path: Path) -> None:
    measured = read(tmp_path, mlp=layers(MODEL))
    gemm = next(each for each in measured.operators if each.operator == "gemm")
    assert (gemm.precision, tuple(gemm.shape)) == ("fp16", ("m", "n", "k"))
    assert rows(gemm) == pytest.approx(
        {
            (32, (16 + 2 * 4) * 64 // 2, 1024): 3e-3,
            (32, 1024, 1024 // 2): 5e-3,
            (32, 2 * 4096 // 2, 1024): 7e-3,
            (32, 1024, 4096 // 2): 9e-3,
        }
    )


def test_norms_and_activations_count_the_bytes_read_and_written_once(tmp_path: Path) -> None:
    operators = {each.operator: each for each in read(tmp_path, mlp=layers(MODEL)).operators}
    assert sorted(operators) == ["gemm", "rms_norm", "swiglu"]
    # Both norms, 2 ms and 6 ms, have one shape.
    assert rows(operators["rms_norm"]) == pytest.approx({(2 * 2 * 32 * 1024,): 4e-3})
    assert rows(operators["swiglu"]) == pytest.approx({(3 * 2 * 32 * 4096 / 2,): 8e-3})


def test_models_without_gates_give_projections_only(tmp_path: Path) -> None:
    text = layers("32,32,2560,10240,51200,False,8,1", without="post_attention_layernorm")
    (gemm,) = read(tmp_path, mlp=text).operators
    assert (8.0, 10240.0, 2560.0) in rows(gemm)


def test_equal_shapes_count_by_their_median_over_all_models(tmp_path: Path) -> None:
    texts = [layers(MODEL, milliseconds=time) for time in (1.0, 2.0, 9.0)]
    measured = read(
        tmp_path,
        compute__h100__a__A__mlp=texts[0],
        compute__h100__a__B__mlp=texts[1],
        compute__h100__C__mlp=texts[2],
    )
    gemm = measured.operators[0]
    assert rows(gemm)[32.0, 1024.0, 512.0] == pytest.approx(2.0 * 5e-3)
    assert gemm.source == "Vidur profiling data (MIT): compute/h100"
    assert [name for name, _, _ in measured.inputs] == [
        "compute/h100/C/mlp.csv",
        "compute/h100/a/A/mlp.csv",
        "compute/h100/a/B/mlp.csv",
    ]


def test_blank_and_zero_times_are_not_samples(tmp_path: Path) -> None:
    text = layers(MODEL).replace(",3.0,", ",,").replace(",5.0,5.0,", ",5.0,0.0,")
    (gemm, *_) = read(tmp_path, mlp=text).operators
    assert sorted(rows(gemm).values()) == pytest.approx([7e-3, 9e-3])


def test_groups_inside_one_node_are_curves(tmp_path: Path) -> None:
    reduce = network(
        "all_reduce",
        (0.03, 8, 4096, 8),
        (0.02, 8, 2048, 8),
        (0.04, 8, 2048, 8),
        (0.01, 2, 2048, 2),
        (0.9, 2, 2048, 1),
    )
    send = network("send_recv", (0.01, 2, 2048, 2), (0.5, 2, 2048, 1))
    measured = read(tmp_path, network__h100_dgx__all_reduce=reduce, network__h100_dgx__send_recv=send)
    curves = {(each.collective, each.ranks): each for each in measured.collectives}
    assert list(curves) == [("all_reduce", 2), ("all_reduce", 8), ("send", 2)]
    np.testing.assert_allclose(curves["all_reduce", 8].num_bytes, [2048, 4096])
    np.testing.assert_allclose(curves["all_reduce", 8].seconds, [30e-6, 30e-6])
    np.testing.assert_allclose(curves["send", 2].seconds, [10e-6])
    assert curves["send", 2].source == "Vidur profiling data (MIT): network/h100_dgx"
    assert (measured.kernels, measured.operators) == ("nccl", ())


def test_attribution_licence_and_inputs_say_whose_data_it_is(tmp_path: Path) -> None:
    text = layers(MODEL, MODEL)
    measured = read(tmp_path, mlp=text)
    assert (measured.gpu, measured.attribution) == ("h100-sxm-80", "Vidur profiling data, Microsoft")
    assert (measured.licence, measured.kernels) == ("MIT", "sarathi-serve")
    assert measured.inputs == (("mlp.csv", hashlib.sha256(text.encode()).hexdigest(), 2),)


@pytest.mark.parametrize(
    ("gpu", "network_folder"), [("h100-sxm-80", "h100_dgx"), ("h100-nvl-94", "h100_pairwise_nvlink")]
)
def test_of_all_folders_those_of_the_gpu_and_its_form_are_read(
    tmp_path: Path, gpu: str, network_folder: str
) -> None:
    reduce = network("all_reduce", (0.02, 2, 2048, 2))
    folders = ("a100_dgx", "h100_dgx", "h100_pairwise_nvlink")
    tables = {f"network__{name}__all_reduce": reduce for name in folders}
    tables |= {f"compute__{name}__A__mlp": layers(MODEL) for name in ("a100", "h100")}
    names = [name for name, _, _ in read(tmp_path, gpu, **tables).inputs]
    assert names == ["compute/h100/A/mlp.csv", f"network/{network_folder}/all_reduce.csv"]


def test_a_network_named_by_its_own_folder_is_read_whatever_its_form(tmp_path: Path) -> None:
    write(tmp_path, network__h100_pairwise_nvlink__all_reduce=network("all_reduce", (0.02, 2, 2048, 2)))
    measured = read_vidur(tmp_path / "network" / "h100_pairwise_nvlink", "h100-sxm-80")
    assert measured.collectives[0].source == "Vidur profiling data (MIT): network/h100_pairwise_nvlink"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mlp.csv:1: not a table of Vidur: column(s) use_gated_mlp, n_head, n_kv_head,"),
        (f"{SIZES}\n{MODEL}\n", "are missing"),
        (layers(MODEL, without="mlp_up_proj"), "mlp.csv:1: not a table of Vidur: column(s) time_stats.mlp_up_proj.median are missing"),
        (layers(), "mlp.csv: the table has no rows; fetch it again"),
        (layers(MODEL) + "1.0,2.0\n", "mlp.csv:3: the row has more or fewer cells than the header"),
        (layers(MODEL).replace(",3.0,", ",fast,"), "mlp.csv:2: time_stats.attn_pre_proj.median: 'fast' is not a number"),
        (layers(MODEL).replace(",3.0,", ",-3.0,"), "mlp.csv:2: time_stats.attn_pre_proj.median must be a finite number of"),
        (layers(MODEL.replace("True", "yes")), "mlp.csv:2: use_gated_mlp must be True or False, not 'yes'"),
        (layers(MODEL.replace(",32,2", ",0,2")), "mlp.csv:2: num_tokens must be a whole number above zero, not '0'"),
        (layers(MODEL.replace(",32,2", ",32,3")), "mlp.csv:2: heads, n_embd or n_expanded_embd do not divide by num_tensor"),
        (layers(MODEL) + '"open', "mlp.csv: is not a CSV table (unexpected end of data)"),
    ],
)  # fmt: skip
def test_a_table_that_is_not_of_vidur_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in fault(tmp_path, mlp=text)


def test_a_table_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mlp.csv").write_bytes(b"\xff\xfe\x00")
    assert fault(tmp_path) == "mlp.csv: is not UTF-8 text; fetch it again"


def test_folders_without_tables_of_the_gpu_are_refused(tmp_path: Path) -> None:
    assert (
        fault(tmp_path)
        == "FOLDER: no mlp.csv, all_reduce.csv, send_recv.csv there; name data/profiling of a copy of Vidur"
    )
    (tmp_path / "mlp.csv").mkdir()
    assert fault(tmp_path) == "mlp.csv: cannot be read (Is a directory)"
    with pytest.raises(SpecError, match=r"x: no such folder; name data/profiling of a copy of github.com"):
        read_vidur(tmp_path / "x", "h100-sxm-80")


def test_tables_of_another_gpu_are_refused(tmp_path: Path) -> None:
    message = fault(tmp_path, "h200-sxm-141", compute__h100__A__mlp=layers(MODEL))
    assert message == "FOLDER: tables of compute/h100, none of h200-sxm-141; name a folder with its tables"


def test_networks_that_the_form_of_the_gpu_does_not_tell_apart_are_refused(tmp_path: Path) -> None:
    reduce = network("all_reduce", (0.02, 2, 2048, 2))
    message = fault(
        tmp_path, "a40", network__a40_four__all_reduce=reduce, network__a40_pairs__all_reduce=reduce
    )
    assert (
        message
        == "FOLDER: several networks of a40: network/a40_four, network/a40_pairs; name one of these folders"
    )


def test_groups_over_several_nodes_alone_are_refused(tmp_path: Path) -> None:
    message = fault(tmp_path, network__h100_dgx__send_recv=network("send_recv", (0.5, 2, 2048, 1)))
    expected = "no times above zero, nor of a group inside one node, in network/h100_dgx/send_recv.csv; name other tables"
    assert message == f"FOLDER: {expected}"
