"""Let the tests of this folder import ``serving_deployments``: pytest's importlib mode adds no folder to the path."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "serving_deployments", Path(__file__).with_name("serving_deployments.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules["serving_deployments"] = _MODULE
_SPEC.loader.exec_module(_MODULE)
