"""Ask NVIDIA Dynamo whether it reads every exported graph deployment, and finds in it what the plan says.

    PYTHONPATH=WHEELS:DEPENDENCIES python benchmarks/conformance_dynamo.py

WHEELS is the folder of the unzipped wheels of ai-dynamo 1.6.1 and ai-dynamo-runtime 1.6.1 (pip download --no-deps);
DEPENDENCIES holds pydantic, msgspec, uvloop, prometheus_client and pyzmq (pip install --target, without its numpy). What
runs engines or talks to a cluster is stood in for by empty modules. Each v1beta1 manifest is read by the profiler's model
of a deployment, the planner looks for the prefill and the decode workers in it, and the frontend parses its arguments.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conformance_bridge import StandIns
from conformance_missing import exit_with
from conformance_serving import Case, good_cases

from meshwright.planner.export import SERVING_EXPORTERS

TARGET = "dynamo-v1beta1"
_ABSENT = (
    *("aisimulate_core", "kubernetes", "kubernetes_asyncio", "plotly", "matplotlib", "filterpy", "pmdarima"),
    *("prometheus_api_client", "prophet", "sklearn", "aiperf", "gradio", "jinja2", "aiofiles", "grpc"),
    *("huggingface_hub", "tritonclient", "pandas", "transformers", "aiohttp", "aiconfigurator"),
)


def main() -> int:
    """Print how many manifests Dynamo reads; return 1 if it refuses one."""
    sys.meta_path.append(StandIns(_ABSENT))
    ask = dynamo_client()
    logging.disable(logging.WARNING)
    exporter, counts = SERVING_EXPORTERS[TARGET], Counter[bool]()
    for case in itertools.chain(good_cases("vllm"), good_cases("sglang")):
        if exporter.unsupported(case.job, case.plan):
            continue
        bundle = exporter.export(case.job, case.plan)
        (manifest,) = (file.text for file in bundle.files if file.name == "dynamo.yaml")
        error = said(ask, yaml.safe_load(manifest), case)
        counts[error is None] += 1
        if error is not None:
            print(f"REJECTED {case.job.model.name} {case.plan}\n  {error}")
    print(f"{TARGET}: {counts[True]} of {counts.total()} manifests accepted")
    return 1 if counts[False] else 0


def said(ask: Callable[[dict[str, Any], Case], None], manifest: dict[str, Any], case: Case) -> str | None:
    """Return why Dynamo refuses a manifest; None when it takes it."""
    try:
        ask(manifest, case)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


def dynamo_client() -> Callable[[dict[str, Any], Case], None]:
    """Return what reads a manifest as Dynamo's profiler, planner and frontend do."""
    from dynamo.frontend.frontend_args import FrontendArgGroup, FrontendConfig
    from dynamo.planner.config.defaults import SubComponentType
    from dynamo.planner.monitoring.dgd_services import get_component_from_type_or_name
    from dynamo.profiler.utils.config import Config, get_main_container

    parser = argparse.ArgumentParser(exit_on_error=False)
    FrontendArgGroup().add_arguments(parser)

    def ask(manifest: dict[str, Any], case: Case) -> None:
        config = Config.model_validate(manifest)
        for pool in case.plan.pools:
            kind = SubComponentType.PREFILL if pool.role == "prefill" else SubComponentType.DECODE
            found = get_component_from_type_or_name(manifest, kind)
            if found.number_replicas() != pool.num_replicas:
                raise ValueError(f"{found.name}: {found.number_replicas()} replicas, not {pool.num_replicas}")
            (component,) = (each for each in config.spec.components if each.name == found.name)
            container = get_main_container(component)
            nodes = getattr(component.multinode, "nodeCount", 1) if component.multinode else 1
            gpus = nodes * int(container.resources["limits"]["nvidia.com/gpu"])
            if gpus != pool.gpus_per_replica:
                raise ValueError(f"{found.name}: {gpus} GPUs, not {pool.gpus_per_replica}")
        (frontend,) = (each for each in config.spec.components if each.component_type == "frontend")
        words = list(get_main_container(frontend).args or ())
        if words[:2] == ["-m", "dynamo.frontend"]:
            words = words[2:]
        FrontendConfig.from_cli_args(parser.parse_args(words)).validate()

    return ask


if __name__ == "__main__":
    exit_with(main, "NVIDIA Dynamo's own code (package ai-dynamo, see --help)")
