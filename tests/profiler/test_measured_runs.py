from __future__ import annotations

from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.profiler.measured_runs import COLUMNS, MeasuredRun, read_measured_runs

HEADER = "id,source,model,gpu,n_gpus,seq_len,micro_batch,global_batch,measured"
ROW = "a-1,paper,llama-3-8b,H100,8,2048,1,64,time"


def read(folder: Path, text: str | bytes) -> tuple[MeasuredRun, ...]:
    path = folder / "runs.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_measured_runs(path)


def test_a_row_is_read_as_text_and_figures(tmp_path: Path) -> None:
    text = f'{HEADER},measured_seconds,measured_memory_gib,notes\n{ROW}, 1.5 ,2,"said, so"\n'
    (run,) = read(tmp_path, text)
    assert (run.id, run.source, run.measured) == ("a-1", "paper", "time")
    assert run.measured_seconds == 1.5
    assert run.measured_memory_bytes == 2 * 2**30
    assert run.cell("model") == "llama-3-8b"
    assert run.cell("notes") == "said, so"


def test_columns_that_a_table_lacks_are_blank(tmp_path: Path) -> None:
    (run,) = read(tmp_path, f"{HEADER}\n{ROW}\n")
    assert run.cell("schedule") == ""
    assert run.quality == "ok"
    assert run.measured_seconds is None
    assert run.measured_memory_bytes is None


def test_blank_quality_is_ok_and_blank_measured_is_time(tmp_path: Path) -> None:
    text = f"{HEADER},quality\n{ROW.removesuffix('time')},\n{ROW},noisy\n"
    first, second = read(tmp_path, text)
    assert (first.quality, first.measured) == ("ok", "time")
    assert second.quality == "noisy"


def test_the_columns_are_the_documented_ones_in_any_order(tmp_path: Path) -> None:
    assert len(COLUMNS) == len(set(COLUMNS)) == 45
    every = [*COLUMNS, "cluster", "calibration"]
    blank = {"measured", "measured_seconds", "measured_memory_gib"}
    cells = ["" if name in blank else "1" for name in every]
    (run,) = read(tmp_path, ",".join(reversed(every)) + "\n" + ",".join(reversed(cells)) + "\n")
    assert run.cell("cluster") == "1"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (run,) = read(tmp_path, b"\xef\xbb\xbf" + f"{HEADER}\r\n{ROW}\r\n".encode())
    assert run.id == "a-1"


def test_quoted_cells_may_span_lines(tmp_path: Path) -> None:
    first, second = read(tmp_path, f'{HEADER},notes\n{ROW},"two\nlines"\n{ROW},one\n')
    assert first.cell("notes").startswith("two")
    assert first.cell("notes").endswith("lines")
    assert second.cell("notes") == "one"


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    assert read(tmp_path, HEADER + "\n") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"runs\.csv:1: not a table of measured training runs: column\(s\) id, source"),
        ("\n\n", r"not a table of measured training runs"),
        ("a,b\n1,2\n", r"runs\.csv:1: unknown column 'a'"),
        (f"{HEADER},vocabs\n", r"unknown column 'vocabs'; did you mean 'vocab'\?"),
        (HEADER.removesuffix(",measured") + "\n", r"column\(s\) measured are missing"),
        ("<html><body>moved</body></html>", "unknown column '<html>"),
        (f"{HEADER}\n{ROW},more\n", r"runs\.csv:2: the row has more or fewer cells than the header"),
        (f"{HEADER}\na-1,paper\n", r"runs\.csv:2: the row has more or fewer cells than the header"),
        (f'{HEADER},notes\n{ROW},"open\n', r"is not a CSV table"),
        (
            f"{HEADER},measured_seconds\n{ROW},fast\n",
            r"runs\.csv:2: measured_seconds: 'fast' is not a number",
        ),
        (f"{HEADER},measured_seconds\n{ROW},0\n", "must be a finite number above zero, not 0"),
        (f"{HEADER},measured_seconds\n{ROW},-1\n", "must be a finite number above zero, not -1"),
        (f"{HEADER},measured_seconds\n{ROW},nan\n", "must be a finite number above zero, not nan"),
        (f"{HEADER},measured_memory_gib\n{ROW},inf\n", "measured_memory_gib must be a finite number"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not UTF-8 text; save the table as CSV"),
        (f"{HEADER},notes\n{ROW},".encode() + b"x" * 200_000 + b"\n", r"is not a CSV table"),
    ],
)
def test_what_is_no_such_table_is_refused_in_one_sentence(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file; name a CSV table"):
        read_measured_runs(tmp_path / "nothing.csv")
    with pytest.raises(SpecError, match="is a directory; name the CSV file"):
        read_measured_runs(tmp_path)
    (tmp_path / "file").write_text(HEADER)
    with pytest.raises(SpecError, match="no such file"):
        read_measured_runs(tmp_path / "file" / "runs.csv")
