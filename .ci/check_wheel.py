"""Build the wheel and compare what it holds with the checkout: every module and data file, nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "costmodels", "hardware_specs", "kernels", "planner", "profiler", "simcore")
SUFFIXES = (".cu", ".json", ".py", ".typed", ".yaml")


def expected() -> set[str]:
    """Return the files the wheel must hold, as paths inside it."""
    names = {
        f"meshwright/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES
    }
    top = ROOT / "src" / "meshwright"
    return names | {f"meshwright/{path.name}" for path in top.iterdir() if path.suffix in SUFFIXES}


def main() -> None:
    """Build, compare, and exit with 1 and the difference when they differ."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", scratch, str(ROOT)], check=True
        )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            held = {name for name in archive.namelist() if ".dist-info/" not in name}
    missing, extra = sorted(expected() - held), sorted(held - expected())
    if missing or extra:
        sys.exit(f"the wheel differs from the checkout: missing {missing}, extra {extra}")
    print(f"wheel holds all {len(held)} files")


if __name__ == "__main__":
    main()
