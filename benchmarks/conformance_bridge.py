"""Ask Megatron-Bridge whether it accepts the overrides of every exported plan.

    PYTHONPATH=WHEEL:DEPENDENCIES python benchmarks/conformance_bridge.py

WHEEL is the folder of an unzipped wheel of megatron-bridge (0.3.1 is the newest for Python 3.11: pip download
megatron-bridge --no-deps), DEPENDENCIES what pip puts there with --target for transformers 4.57 and omegaconf, without its
numpy; megatron-core is that of the extra "conformance". What needs a GPU to be installed, or only moves data, is stood in
for by empty modules. Each plan's ``apply_plan`` runs on a ``ConfigContainer`` of its model, which then validates itself
for the plan's world.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import os
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "conformance"))

from conformance_corpus import corpus
from conformance_missing import exit_with

from meshwright.planner.export import EXPORTERS
from meshwright.simcore.domain.job import TrainingJob

TARGET = "megatron-bridge"
_ABSENT = (
    *("transformer_engine", "modelopt", "nvidia_resiliency_ext", "nvdlfw_inspect", "torchvision", "wandb"),
    *("qwen_vl_utils", "mamba_ssm", "causal_conv1d", "flash_attn", "timm", "open_clip", "nvtx", "datasets"),
    *("megatron.energon", "einops", "tensorboard", "webdataset", "sentencepiece", "tiktoken", "PIL", "six"),
    *("nltk", "comet_ml", "mlflow", "nemo_run", "decord", "fla"),
)


class _AnyName(type):
    """A class whose attributes are classes too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {"__init__": lambda self, *arguments, **keywords: None})

    def __or__(cls, other: object) -> Any:
        return cls

    def __getitem__(cls, item: object) -> Any:
        return cls


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are absent as empty modules, whose every name is an empty class."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Return a spec for what is absent."""
        if any(name == absent or name.startswith(f"{absent}.") for absent in self._names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Return an empty module."""
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__dict__["__version__"] = "0"
        module.__dict__["__getattr__"] = lambda name: getattr(_AnyName("stand_in", (), {}), name)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Leave it empty."""


def main() -> int:
    """Print how many exports Bridge accepts, and each that it does not; return 1 if there are any."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    container = bridge_container()
    exporter, begin = EXPORTERS[TARGET], time.perf_counter()
    counts: Counter[bool] = Counter()
    for each in corpus():
        if exporter.unsupported(each.job, each.plan):
            continue
        bundle = exporter.export(each.job, each.plan, "torchrun")
        module = next(file.text for file in bundle.files if file.name == "meshwright_plan.py")
        error = asked(container, module, each.job, each.plan.num_gpus)
        counts[error is None] += 1
        if error is not None:
            print(f"REJECTED {each.name}: {error}")
    print(
        f"{TARGET}: {counts[True]} of {counts.total()} exports accepted, {time.perf_counter() - begin:.0f} s"
    )
    return 1 if counts[False] else 0


def asked(container: Callable[[TrainingJob], Any], module: str, job: TrainingJob, world: int) -> str | None:
    """Return why Bridge refuses a plan's overrides; None when it takes them."""
    os.environ.update({"WORLD_SIZE": str(world), "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    names: dict[str, Any] = {}
    try:
        exec(compile(module, "meshwright_plan.py", "exec"), names)
        config = container(job)
        names["apply_plan"](config)
        config.validate()
    except Exception as error:  # whatever it raises is its verdict
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"
    return None


def bridge_container() -> Callable[[TrainingJob], Any]:
    """Return what makes a Bridge configuration of a job's model, as a recipe would."""
    import torch

    # Before the stand-ins, which both would take for the real packages.
    for name in ("megatron.core.transformer.transformer_config", "transformers"):
        importlib.import_module(name)
    sys.meta_path.append(StandIns(_ABSENT))
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    torch.cuda.get_device_capability = lambda *arguments, **keywords: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *arguments, **keywords: properties
    from megatron.bridge.models.gpt_provider import GPTModelProvider
    from megatron.bridge.training import config as bridge

    def make(job: TrainingJob) -> Any:
        model, length = job.model, job.workload.sequence_length
        shape: dict[str, Any] = {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "seq_length": length,
            "vocab_size": model.vocab_size,
            "add_bias_linear": False,
            "mtp_num_layers": model.num_mtp_layers or None,
            "multi_latent_attention": model.mla is not None,
        }
        if model.moe is not None:
            shape |= {
                "num_moe_experts": model.moe.num_experts,
                "moe_router_topk": model.moe.top_k,
                "moe_ffn_hidden_size": model.moe.moe_ffn_hidden_size,
                "moe_token_dispatcher_type": "alltoall",
                "moe_grouped_gemm": True,
            }
        return bridge.ConfigContainer(
            model=GPTModelProvider(**shape),
            train=bridge.TrainingConfig(train_iters=10),
            optimizer=bridge.OptimizerConfig(optimizer="adam", lr=1e-4, min_lr=1e-5),
            scheduler=bridge.SchedulerConfig(),
            dataset=bridge.MockGPTDatasetConfig(
                random_seed=1,
                seq_length=length,
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
            ),
            logger=bridge.LoggerConfig(),
            tokenizer=bridge.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=model.vocab_size),
            checkpoint=bridge.CheckpointConfig(),
        )

    return make


if __name__ == "__main__":
    exit_with(main, "Megatron-Bridge and what it imports (see the first lines of this file)")
