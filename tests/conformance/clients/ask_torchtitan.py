"""Ask torchtitan's command line: ``PYTHONPATH=<torchtitan> python ask_torchtitan.py QUESTIONS ANSWERS``.

Runs ``ConfigManager`` on the arguments, ``ParallelDims`` on what it read, builds the mesh on torch's "fake" backend and,
where the release has them, updates the model's configuration. Packages that only training needs (data, logging) are
stood in for where they are absent.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import logging
import sys
import types
import typing
from pathlib import Path

STAND_INS = (
    *(
        "PIL",
        "av",
        "datasets",
        "grain",
        "huggingface_hub",
        "requests",
        "safetensors",
        "tensorboard",
        "tokenizers",
    ),
    *("torch.utils.tensorboard", "torch_checkpointing", "torchao", "torchdata", "torchvision", "wandb"),
)


class Anything:
    """A class that takes any use at import."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        pass

    def __class_getitem__(cls, item: object) -> type:
        return cls

    def __init_subclass__(cls, **keywords: object) -> None:
        pass


class Module(types.ModuleType):
    """A module that has any public name."""

    def __getattr__(self, name: str) -> typing.Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that training needs, where nothing else did."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> typing.Any:
        if any(name == known or name.startswith(f"{known}.") for known in STAND_INS):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = Module(spec.name)
        module.__path__ = []
        module.__version__ = "9.9"
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


# torch.utils.tensorboard exists and fails without tensorboard; the others come last.
if importlib.util.find_spec("tensorboard") is None:
    sys.meta_path.insert(0, Finder())
else:
    sys.meta_path.append(Finder())
logging.disable(logging.ERROR)

import torch.distributed as dist  # noqa: E402
from torch.distributed.pipelining.schedules import _Action  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torchtitan.config.manager import ConfigManager  # noqa: E402
from torchtitan.distributed.parallel_dims import ParallelDims  # noqa: E402

IS_OLD = importlib.util.find_spec("torchtitan.config.job_config") is not None
if not IS_OLD:
    import torchtitan.components.quantization.float8 as float8
    import torchtitan.components.quantization.mx as mx

    float8.has_cuda_capability = mx.has_cuda_capability = lambda *_: True
# Worlds whose mesh is built; larger ones only cost time.
LARGEST_MESH = 64


def read(question: dict) -> None:
    """Read one command line, check its sizes and build its mesh."""
    config = ConfigManager().parse_args(question["arguments"])
    parallel, world = config.parallelism, question["world"]
    sizes = {
        "dp_replicate": parallel.data_parallel_replicate_degree,
        "dp_shard": parallel.data_parallel_shard_degree,
        "cp": parallel.context_parallel_degree,
        "tp": parallel.tensor_parallel_degree,
        "pp": parallel.pipeline_parallel_degree,
        "ep": parallel.expert_parallel_degree,
        "world_size": world,
    }
    if IS_OLD:
        sizes["etp"] = parallel.expert_tensor_parallel_degree
    dimensions = ParallelDims(**sizes)
    if world <= LARGEST_MESH:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            dimensions.build_mesh()
        finally:
            dist.destroy_process_group()
    if config.training.global_batch_size != question["batch"]:
        raise ValueError(f"global_batch_size {config.training.global_batch_size} is not {question['batch']}")
    stages = parallel.module_fqns_per_model_part
    if (len(stages) if stages else 1) != question["stages"]:
        raise ValueError(f"module_fqns_per_model_part {stages} are not {question['stages']} stages")
    if parallel.pipeline_parallel_schedule_csv:
        rows = Path(parallel.pipeline_parallel_schedule_csv).read_text().splitlines()
        cells = [_Action.from_str(cell) for line in rows for cell in line.split(",")]
        if len(rows) != sizes["pp"] or None in cells:
            raise ValueError(
                f"the schedule's table has {len(rows)} rows for {sizes['pp']} ranks, or an empty cell"
            )
    if not IS_OLD and question["is_registered"]:
        if len(config.model_spec.model.layers) != question["layers"]:
            raise ValueError(
                f"the model has {len(config.model_spec.model.layers)} layers, not {question['layers']}"
            )
        config.model_spec.model.update_from_config(config=config)


def answer(question: dict) -> dict:
    """Return the framework's error, None without one."""
    written = io.StringIO()
    sys.modules.pop("meshwright_model", None)
    sys.path.insert(0, question["folder"])
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            read(question)
    except SystemExit:
        return {"error": f"command line: {written.getvalue()[:400]}"}
    except Exception as error:  # whatever it raises is its verdict
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        sys.path.remove(question["folder"])
    return {"error": None}


def main() -> None:
    """Answer every question of a file."""
    questions = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(question) for question in questions]))


if __name__ == "__main__":
    main()
