from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from meshwright.costmodels.serving.constants import (
    CERTAINTIES,
    FITTABLE,
    UNSTATED,
    EngineConstants,
    engine_constants,
    release_key,
    with_engine_constants,
)
from meshwright.errors import SpecError
from meshwright.simcore.domain.serving import ENGINES

VERSIONS = ["", UNSTATED, "0.5.1.post1", "0.12.0", "0.18.0", "1.0.0rc3", "1.2.0rc6.post2", "nightly-dev"]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_release_kind_and_architecture_has_constants(engine: str) -> None:
    for version, is_moe, architecture in itertools.product(
        VERSIONS, (False, True), ("ampere", "hopper", "blackwell", "cdna3")
    ):
        constants = engine_constants(engine, version, is_moe=is_moe, architecture=architecture)
        assert all(getattr(constants, name) >= 0.0 for name in FITTABLE)
        named = [set(constants.names(kind)) for kind in CERTAINTIES]
        assert set(FITTABLE) <= set.union(*named)
        assert sum(len(part) for part in named) == len(set.union(*named))


def test_constants_fitted_to_a_release_say_so_and_others_borrow_them() -> None:
    fitted = engine_constants("vllm", "0.12.0", is_moe=False, architecture="hopper")
    assert "host_time_per_sequence" in fitted.names("fitted")
    assert not fitted.is_host_hidden
    newer = engine_constants("vllm", "0.30.0", is_moe=False, architecture="ampere")
    assert "host_time_per_sequence" in newer.names("borrowed")
    assert any("Qwen3-32B" in text for text in fitted.evidence)


def test_releases_sort_as_they_were_published() -> None:
    order = [
        "0.5.1.post1",
        "0.5.9",
        "0.5.10.post1",
        "0.12.0",
        "1.0.0rc3",
        "1.0.0",
        "1.2.0rc6.post2",
        "1.2.0rc6.post3",
    ]
    keys = [release_key(version) for version in order]
    assert keys == sorted(keys)
    assert release_key("nightly-dev") > release_key("99.0.0")


def test_the_users_constants_win_and_unknown_ones_are_refused() -> None:
    known = engine_constants("vllm", "0.12.0", is_moe=False, architecture="hopper")
    mine = with_engine_constants(known, {"serving-vllm": {"step_latency": 0.002}})
    assert mine.step_latency == 0.002
    assert "step_latency" in mine.names("fitted")
    assert with_engine_constants(known, {"serving-sglang": {"step_latency": 0.002}}) is known
    with pytest.raises(SpecError, match=r"unknown constant.*step_latency"):
        with_engine_constants(known, {"serving-vllm": {"step_latancy": 1.0}})


def test_an_unknown_engine_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'vllm'"):
        engine_constants("vlm", "", is_moe=False, architecture="hopper")


def test_a_build_by_name_takes_the_block_that_names_it() -> None:
    def of(version: str) -> EngineConstants:
        return engine_constants("sglang", version, is_moe=True, architecture="blackwell")

    build, before, after = of("nightly-dev-20260216"), of("0.5.9"), of("0.5.10.post1")
    assert replace(build, version="0.5.9", evidence=before.evidence) == before
    assert (build.absorbs_prompts, after.absorbs_prompts) == (False, True)
    # Any other name is newer than every release.
    assert replace(of("main"), version="0.5.10.post1") == after


def test_formats_with_kernels_of_their_own_take_the_block_that_names_them() -> None:
    def factor(experts: str) -> float:
        return engine_constants(
            "vllm", "0.15.1", is_moe=True, architecture="blackwell", experts=experts
        ).expert_factor

    assert factor("int4_wo") == 1.0
    assert factor("nvfp4") == factor("") < 1.0
