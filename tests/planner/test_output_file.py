from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from meshwright.errors import SpecError
from meshwright.planner.output_file import (
    check_replaceable,
    is_our_json,
    is_our_svg,
    is_our_trace,
    is_our_yaml,
    replace_file,
)

OURS = b"schema_version: 1\nkind: training_plan\nwritten_by: meshwright\n"
FOREIGN = b"my: notes\n"


def test_a_new_file_is_written_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "plan.yaml"
    replace_file(path, OURS, force=False, is_ours=is_our_yaml)
    assert path.read_bytes() == OURS


def test_our_own_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(OURS + b"old\n")
    replace_file(path, OURS, force=False, is_ours=is_our_yaml)
    assert path.read_bytes() == OURS


@pytest.mark.parametrize("content", [FOREIGN, b"", b"\x00\xff", b"#" * 500 + OURS])
def test_a_foreign_file_is_never_replaced_without_force(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"exists and was not written by Meshwright; .* --force"):
        replace_file(path, OURS, force=False, is_ours=is_our_yaml)
    assert path.read_bytes() == content
    replace_file(path, OURS, force=True, is_ours=is_our_yaml)
    assert path.read_bytes() == OURS


@pytest.mark.parametrize("force", [False, True])
def test_folders_and_links_are_never_replaced(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "target.yaml"
    target.write_bytes(OURS)
    link, folder = tmp_path / "link.yaml", tmp_path / "folder"
    link.symlink_to(target)
    folder.mkdir()
    with pytest.raises(SpecError, match="is a symbolic link"):
        replace_file(link, b"new", force=force, is_ours=is_our_yaml)
    with pytest.raises(SpecError, match="is a directory"):
        replace_file(folder, b"new", force=force, is_ours=is_our_yaml)
    assert target.read_bytes() == OURS
    assert link.is_symlink()


def test_nothing_but_the_file_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    for _ in range(3):
        replace_file(path, OURS, force=False, is_ours=is_our_yaml)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(OURS)

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(
        SpecError, match=r"cannot be written \(No space left on device\); nothing was changed"
    ):
        replace_file(path, OURS + b"new\n", force=False, is_ours=is_our_yaml)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.yaml"]
    assert path.read_bytes() == OURS


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new.yaml", force=False, is_ours=is_our_yaml)
    assert list(tmp_path.iterdir()) == []


def test_each_kind_of_file_carries_its_mark() -> None:
    assert is_our_yaml(OURS)
    assert is_our_json(b'{"schema_version": 1, "written_by": "meshwright"}')
    assert is_our_svg(b'<svg xmlns="http://www.w3.org/2000/svg"><!-- meshwright -->')
    trace = b'{"otherData":{"written_by":"meshwright"}}'
    assert is_our_trace(trace)
    assert is_our_trace(gzip.compress(trace))


@pytest.mark.parametrize("content", [b"", FOREIGN, b"{}", b"\x1f\x8bbroken", gzip.compress(b"{}", mtime=0)])
def test_foreign_content_carries_no_mark(content: bytes) -> None:
    for is_ours in (is_our_yaml, is_our_json, is_our_svg, is_our_trace):
        assert not is_ours(content)
