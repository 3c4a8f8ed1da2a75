"""Writing a bundle never destroys what the user made, and never leaves half a file."""

from __future__ import annotations

import json
import os
import stat

import pytest

from meshwright.errors import ExportError
from meshwright.planner.export import MANIFEST_NAME, ExportBundle, ExportFile, write_bundle


def bundle(*files: tuple[str, str]) -> ExportBundle:
    return ExportBundle(
        target="test",
        target_version="1",
        files=tuple(ExportFile(name, text, name.endswith(".sh")) for name, text in files),
        launch_command="bash a.sh",
    )


ONE = bundle(("a.sh", "one\n"), ("b.json", "{}\n"))
TWO = bundle(("a.sh", "two\n"), ("b.json", "{}\n"))


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != MANIFEST_NAME}


def test_files_are_written_in_order_with_their_modes(tmp_path):
    written = write_bundle(ONE, tmp_path / "new" / "out", force=False)
    assert [path.name for path in written] == ["a.sh", "b.json"]
    assert contents(tmp_path / "new" / "out") == {"a.sh": "one\n", "b.json": "{}\n"}
    assert os.access(written[0], os.X_OK)
    assert not stat.S_IMODE(written[1].stat().st_mode) & 0o111


def test_the_manifest_names_each_file_and_its_hash(tmp_path):
    write_bundle(ONE, tmp_path, force=False)
    manifest = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert manifest["schema_version"] == 1
    assert manifest["target"] == "test"
    assert set(manifest["files"]) == {"a.sh", "b.json"}
    assert all(len(digest) == 64 for digest in manifest["files"].values())


def test_own_files_are_replaced_without_force(tmp_path):
    write_bundle(ONE, tmp_path, force=False)
    write_bundle(TWO, tmp_path, force=False)
    assert contents(tmp_path)["a.sh"] == "two\n"


def test_foreign_files_need_force(tmp_path):
    (tmp_path / "b.json").write_text("mine")
    with pytest.raises(ExportError, match=r"b\.json was not written by Meshwright.*--force"):
        write_bundle(ONE, tmp_path, force=False)
    assert contents(tmp_path) == {"b.json": "mine"}
    assert not (tmp_path / MANIFEST_NAME).exists()
    write_bundle(ONE, tmp_path, force=True)
    assert contents(tmp_path)["b.json"] == "{}\n"


def test_edited_files_need_force(tmp_path):
    write_bundle(ONE, tmp_path, force=False)
    (tmp_path / "a.sh").write_text("tuned by hand")
    with pytest.raises(ExportError, match=r"a\.sh was edited since Meshwright wrote it"):
        write_bundle(TWO, tmp_path, force=False)
    assert contents(tmp_path)["a.sh"] == "tuned by hand"


def test_a_foreign_file_with_the_same_text_is_no_conflict(tmp_path):
    (tmp_path / "a.sh").write_text("one\n")
    write_bundle(ONE, tmp_path, force=False)
    assert contents(tmp_path) == {"a.sh": "one\n", "b.json": "{}\n"}


def test_files_of_an_earlier_export_stay_ours(tmp_path):
    write_bundle(ONE, tmp_path, force=False)
    write_bundle(bundle(("a.sh", "alone\n")), tmp_path, force=False)
    write_bundle(bundle(("b.json", "[]\n")), tmp_path, force=False)
    assert contents(tmp_path) == {"a.sh": "alone\n", "b.json": "[]\n"}


@pytest.mark.parametrize("force", [False, True])
def test_symbolic_links_are_refused(tmp_path, force):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "b.json").symlink_to(victim)
    with pytest.raises(ExportError, match="symbolic link"):
        write_bundle(ONE, folder, force=force)
    assert victim.read_text() == "precious"
    assert sorted(path.name for path in folder.iterdir()) == ["b.json"]


@pytest.mark.parametrize("force", [False, True])
def test_a_manifest_that_is_a_link_is_refused(tmp_path, force):
    (tmp_path / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ExportError, match="symbolic link"):
        write_bundle(ONE, tmp_path, force=force)


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "b.json").mkdir()
    with pytest.raises(ExportError, match="not a regular file"):
        write_bundle(ONE, tmp_path, force=True)
    assert contents_names(tmp_path) == ["b.json"]


def contents_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "a/b", "/etc/x", "a b", "a\n", "x" * 64, "caf\u00e9", MANIFEST_NAME]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ExportError, match="plain file name"):
        write_bundle(bundle(("a.sh", "one\n"), (name, "")), tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


def test_names_that_differ_only_in_case_are_refused(tmp_path):
    with pytest.raises(ExportError, match="twice"):
        write_bundle(bundle(("a.sh", ""), ("A.sh", "")), tmp_path, force=False)


@pytest.mark.parametrize("text", ["not json", "[]", '{"schema_version": 2}', "[" * 100_000])
def test_a_broken_manifest_protects_the_files_until_forced(tmp_path, text):
    write_bundle(ONE, tmp_path, force=False)
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ExportError, match="--force"):
        write_bundle(TWO, tmp_path, force=False)
    assert contents(tmp_path)["a.sh"] == "one\n"
    write_bundle(TWO, tmp_path, force=True)
    assert contents(tmp_path)["a.sh"] == "two\n"


def test_a_failing_disk_leaves_whole_files_and_no_temporaries(tmp_path, monkeypatch):
    write_bundle(ONE, tmp_path, force=False)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ExportError, match="No space left"):
        write_bundle(TWO, tmp_path, force=False)
    assert contents(tmp_path) == {"a.sh": "one\n", "b.json": "{}\n"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExportError, match="choose a folder"):
        write_bundle(ONE, tmp_path / "out", force=True)
