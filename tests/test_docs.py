"""The documentation is true: its commands run, its job and cluster files are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from meshwright.hardware_specs import cluster_from_section, parse_yaml
from meshwright.planner.job_file import JobFlags, read_request
from meshwright.planner.serving.job_file import ServingFlags, read_serving_request

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md")])
MAX_LINES = 150


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "console") for line in block.splitlines()]
    return [line.removeprefix("$ meshwright ") for line in lines if line.startswith("$ meshwright ")]


def spec_files() -> list[tuple[str, str]]:
    return [
        (path.name, block)
        for path in PAGES
        for block in blocks(path, "yaml")
        if block.startswith("schema_version")
    ]


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)], ids=lambda path: path.name)
def test_every_command_of_a_page_runs(meshwright, tmp_path, monkeypatch, path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "tests" / "validation").symlink_to(ROOT / "tests" / "validation")
    monkeypatch.chdir(tmp_path)
    for line in commands(path):
        outcome = meshwright(*shlex.split(line))
        assert outcome.code == 0, f"{line}\n{outcome.stderr}"
        assert outcome.stdout


@pytest.mark.parametrize(
    ("page", "text"), spec_files(), ids=lambda value: value if value.endswith(".md") else ""
)
def test_every_job_and_cluster_of_a_page_is_read(tmp_path, page, text):
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    if "\nkind: training\n" in text:
        assert read_request(file, JobFlags()).job.cluster.num_gpus > 0
    elif "\nkind: serving\n" in text:
        assert read_serving_request(file, ServingFlags()).job.cluster.num_gpus > 0
    else:
        assert cluster_from_section(parse_yaml(text, page)).num_gpus > 0


def test_the_pages_hold_commands_and_files():
    assert sum(len(commands(path)) for path in PAGES) >= 15
    assert len(spec_files()) >= 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.name)
def test_a_page_is_short_and_its_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_LINES
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target


def test_every_page_is_on_the_map():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in ROOT.glob("docs/*.md")} - {"index.md"}
    assert {page for page in pages if f"({page})" in index} == pages
