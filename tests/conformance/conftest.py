"""Let the tests of this folder import their helpers; pytest's importlib mode adds no folder to the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Scripts for processes of their own: doctest must not import the frameworks that they import.
collect_ignore_glob = ["clients/*"]

# In the order of their imports.
for _NAME in (
    "conformance_corpus",
    "conformance_broken",
    "conformance_clients",
    "conformance_questions",
    "conformance_report",
):
    _SPEC = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name(f"{_NAME}.py"))
    assert _SPEC is not None
    assert _SPEC.loader is not None
    _MODULE = importlib.util.module_from_spec(_SPEC)
    sys.modules[_NAME] = _MODULE
    _SPEC.loader.exec_module(_MODULE)
