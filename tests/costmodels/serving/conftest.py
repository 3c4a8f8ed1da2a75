"""Served models the serving cost tests share; kernels are loaded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from meshwright.costmodels.serving.constants import engine_constants
from meshwright.costmodels.serving.formats import serving_formats
from meshwright.costmodels.serving.kernels import ServingKernels, load_serving_kernels
from meshwright.costmodels.serving.step import ServedModel
from meshwright.hardware_specs.catalog import resolve_cluster
from meshwright.simcore.domain.model_catalog import load_model

MakeServed = Callable[..., ServedModel]
CLUSTERS = {"h100": "dgx-h100:1", "h200": "dgx-h200:1", "b200": "dgx-b200:1"}


@pytest.fixture(scope="session")
def kernels() -> Callable[[str, str], ServingKernels]:
    loaded: dict[tuple[str, str], ServingKernels] = {}

    def load(gpu: str, engine: str) -> ServingKernels:
        if (gpu, engine) not in loaded:
            cluster = resolve_cluster(CLUSTERS[gpu])
            loaded[gpu, engine] = load_serving_kernels(cluster.gpu, cluster.node, engine)
        return loaded[gpu, engine]

    return load


@pytest.fixture(scope="session")
def make_served(kernels: Callable[[str, str], ServingKernels]) -> MakeServed:
    def make(
        model: str = "llama-3.1-8b",
        precision: str = "bf16",
        kv_precision: str = "bf16",
        gpu: str = "h100",
        engine: str = "vllm",
        version: str = "0.18.0",
        **constants: float | bool,
    ) -> ServedModel:
        spec = load_model(model)
        cluster = resolve_cluster(CLUSTERS[gpu])
        known = engine_constants(
            engine, version, is_moe=spec.moe is not None, architecture=cluster.gpu.architecture
        )
        return ServedModel(
            model=spec,
            formats=serving_formats(
                spec, precision, kv_precision, architecture=cluster.gpu.architecture, engine=engine
            ),
            cluster=cluster,
            kernels=kernels(gpu, engine),
            constants=replace(known, **constants),  # type: ignore[arg-type]  # number and flag fields
        )

    return make
