"""The shape of the repository: folders, links, module names, exports, sizes."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import meshwright

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "meshwright"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# What has no home is not put into one of these: the map is wrong then.
HOMELESS = {"common", "handler", "helpers", "manager", "misc", "util", "utils"}
MAX_LINES = 600
SOURCES = sorted(
    path
    for folder in (*FOLDERS, "src", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() == path
)
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(meshwright.__path__, "meshwright.")
    if not module.name.endswith("__main__")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def isort_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as ruff's RUF022 sorts."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_folders_links_and_wheel_mapping_agree():
    links = {path.name: os.readlink(path) for path in PACKAGE.iterdir() if path.is_symlink()}
    assert links == {folder: f"../../{folder}" for folder in FOLDERS}
    mapped = {key: value for key, value in WHEEL["sources"].items() if key != "src/meshwright"}
    assert mapped == {folder: f"meshwright/{folder}" for folder in FOLDERS}
    assert WHEEL["sources"]["src/meshwright"] == "meshwright"


def test_the_wheel_includes_every_folder_and_every_file_of_the_parent_package():
    own = {f"src/meshwright/{path.name}" for path in PACKAGE.iterdir() if path.is_file()}
    assert set(WHEEL["only-include"]) == own | set(FOLDERS)


def test_bare_folder_names_are_banned_as_imports():
    banned = SETTINGS["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(banned) == FOLDERS


def test_a_clone_without_links_is_told_so_in_one_sentence(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "src" / "meshwright").mkdir(parents=True)
    # What a checkout without symbolic links holds instead: a file with the target's name.
    (tmp_path / "src" / "meshwright" / "cli").write_text("../../cli")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_nothing.py").write_text("def test_nothing():\n    assert True\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "this clone has lost its symbolic links" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_all_is_sorted_and_names_what_exists(module):
    loaded = importlib.import_module(module)
    names = loaded.__all__
    assert list(names) == sorted(set(names), key=isort_key)
    assert [name for name in names if not hasattr(loaded, name)] == []


@pytest.mark.parametrize(
    "module", [name for name in MODULES if hasattr(importlib.import_module(name), "__path__")]
)
def test_a_package_exports_all_that_its_init_imports(module):
    loaded = importlib.import_module(module)
    modules = {
        value.__name__.rpartition(".")[2] for value in vars(loaded).values() if type(value) is type(os)
    }
    # Variants of a family are reached through its dict.
    families = [value for value in vars(loaded).values() if isinstance(value, dict)]
    variants = {type(variant).__name__ for family in families for variant in family.values()}
    variants |= {
        variant.__name__ for family in families for variant in family.values() if isinstance(variant, type)
    }
    variants |= {
        name for name, value in vars(loaded).items() for family in families if value in family.values()
    }
    public = {name for name in vars(loaded) if not name.startswith("_")} - modules - {"annotations"}
    assert set(loaded.__all__) <= public | {"__version__"}
    assert public - variants <= set(loaded.__all__)


def test_no_module_is_a_drawer_for_what_has_no_home():
    assert [name_of(path) for path in SOURCES if path.stem in HOMELESS or path.parent.name in HOMELESS] == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_is_ascii_and_short_enough_to_read(path):
    text = path.read_text(encoding="ascii")
    assert text.count("\n") <= MAX_LINES


def test_no_file_names_a_folder_of_somebodys_machine():
    text_files = [
        path
        for pattern in ("*.md", "*.toml", "docs/*", "examples/*", ".github/**/*")
        for path in ROOT.glob(pattern)
        if path.is_file()
    ]
    own = re.compile(rf"{re.escape(str(ROOT))}|(?<![\w.])/(?:home|root|Users)/\w")
    assert [name_of(path) for path in (*SOURCES, *text_files) if own.search(path.read_text())] == []
