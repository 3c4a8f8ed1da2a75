"""Functions that kernels call."""

from __future__ import annotations

from types import FunctionType

import pytest

from meshwright.simcore.compiled import _with_compiled_parts, has_compiler
from meshwright.simcore.serving.event_loop import costs, loop

KERNEL = loop.run.__wrapped__  # type: ignore[attr-defined]  # set by functools.wraps


def test_a_changed_part_or_constant_gives_a_kernel_another_name_in_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = _with_compiled_parts(KERNEL).__qualname__
    assert name == _with_compiled_parts(KERNEL).__qualname__
    monkeypatch.setattr(costs, "STAGE_SHARE", 99, raising=False)
    assert _with_compiled_parts(KERNEL).__qualname__ == name
    monkeypatch.setattr(costs, "SKEW", 99)
    changed = _with_compiled_parts(KERNEL).__qualname__
    assert changed != name
    code = costs.locate.__code__.replace(co_consts=(*costs.locate.__code__.co_consts, 7))
    monkeypatch.setattr(costs.locate, "__code__", code)
    assert _with_compiled_parts(KERNEL).__qualname__ not in (name, changed)


def test_parts_are_compiled_only_when_they_are_looked_up() -> None:
    names = _with_compiled_parts(KERNEL).__globals__
    assert names.get("deliver") is loop.deliver
    assert isinstance(loop.deliver, FunctionType)
    if has_compiler():
        assert not isinstance(names["pop_event"], FunctionType)
