"""The ranked table of one small job is compared with ``golden/plan_table.txt``, character by character.

After a wanted change, rewrite it and review the difference::

    PYTHONPATH=src UPDATE_GOLDEN=1 pytest tests/cli/test_golden.py
"""

from __future__ import annotations

import os
import re
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "plan_table.txt"


def test_the_report_of_a_small_job_equals_the_golden_file(meshwright, job):
    outcome = meshwright("plan", job, "--top", 3, "--out", "plans")
    assert outcome.code == 0, outcome.stderr
    shown = re.sub(r"in [0-9.]+ s:", "in # s:", outcome.stdout)
    lines = "".join(f"{line.rstrip()}\n" for line in shown.splitlines())
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(lines, encoding="utf-8")
    assert lines == GOLDEN.read_text(encoding="utf-8")
