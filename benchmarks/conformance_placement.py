"""Show what SGLang, vLLM, vLLM-Ascend and TensorRT-LLM read from the placement files written for them.

    python benchmarks/conformance_placement.py FOLDER [sglang vllm vllm-ascend trtllm]

FOLDER holds one folder per engine: an unzipped wheel (pip download ENGINE --no-deps; unzip FILE -d FOLDER/ENGINE -x
'*.so'), or for trtllm the repository or its tensorrt_llm/llmapi/llm_args.py alone at that path. Engines without a
folder are left out and named. Their own modules and classes parse our files, without the compiled libraries around
them: those names are stood in for, and what is asked is only what reads a placement. Needs torch and pydantic; no GPU.

Every file must be read as the slots that were placed; SGLang's own choice of copies must be the nearest one.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import sys
import tempfile
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import yaml
from conformance_missing import exit_missing, exit_with
from numpy.typing import NDArray

from meshwright.planner.placement.balance import balance_slots
from meshwright.planner.placement.distinct import copies_apart
from meshwright.planner.placement.engines import ENGINES
from meshwright.planner.placement.formats.tables import LayerTable
from meshwright.planner.placement.job import moe_layer_indices
from meshwright.planner.placement.spread import spread_slots
from meshwright.planner.placement.synthetic import draw_routing
from meshwright.simcore.domain.expert_placement import ExpertPlacement
from meshwright.simcore.domain.model_catalog import load_model


class Case(NamedTuple):
    """A placement and the model it is for."""

    name: str
    table: LayerTable
    placement: ExpertPlacement


_NEEDS = "one folder per engine (sglang, vllm, vllm-ascend, trtllm) with its unzipped wheel, and torch and pydantic"
# Reads a file as its engine does; returns what is wrong with it, or None.
Client = Callable[[Path, Case], str | None]


def main() -> int:
    """Ask every engine about every placement; returns 1 when one refuses or reads other slots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "engines", nargs="*", metavar="engine", help=f"of {', '.join(CLIENTS)}; all by default"
    )
    flags = parser.parse_args()
    failed, num_asked = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for engine in flags.engines or CLIENTS:
            root = flags.folder / engine
            if not root.is_dir():
                print(f"{engine}: not asked, no folder {root}")
                continue
            num_asked += 1
            client = CLIENTS[engine](root)
            counts = {"read as placed": 0, "REFUSED": 0}
            for case in cases(has_copies_apart=ENGINES[engine].has_copies_apart):
                path = Path(folder) / ENGINES[engine].file_name
                path.write_text(ENGINES[engine].write(case.placement, case.table))
                wrong = client(path, case)
                counts["REFUSED" if wrong else "read as placed"] += 1
                if wrong:
                    failed += 1
                    print(f"  {engine} {case.name}: {wrong}")
            print(f"{engine}: " + ", ".join(f"{count} {words}" for words, count in counts.items() if count))
    if not num_asked:
        exit_missing(f"no engine's code in {flags.folder}", _NEEDS)
    return 1 if failed else 0


def cases(*, has_copies_apart: bool) -> Iterator[Case]:
    """Yield placements of three models, with and without copies, for balance and for nodes."""
    for name, ranks, per_node, extras in (
        ("mixtral-8x7b", 4, 4, (0, 4)),
        ("mixtral-8x7b", 8, 4, (0, 8)),
        ("deepseek-v3", 32, 8, (0, 32)),
        ("qwen3-235b-a22b", 16, 8, (0, 16, 32)),
    ):
        model = load_model(name)
        assert model.moe is not None
        layers = moe_layer_indices(model)
        experts = model.moe.num_experts
        routing = draw_routing(2, experts, model.moe.top_k, 2000, 0)
        assert routing.tokens is not None
        for extra in extras:
            found = {"balance": balance_slots(routing.loads, experts + extra, ranks)}
            if ranks > per_node:
                found["nodes"] = spread_slots(routing.tokens, routing.loads, experts + extra, ranks, per_node)
            for objective, slots in found.items():
                placement = ExpertPlacement(
                    slots=np.resize(slots, (len(layers), experts + extra)),
                    num_experts=experts,
                    num_ranks=ranks,
                    ranks_per_node=per_node,
                )
                if has_copies_apart:
                    placement = copies_apart(placement, np.resize(routing.loads, (len(layers), experts)))
                yield Case(
                    f"{name}, {ranks} ranks, {extra} copies, {objective}",
                    LayerTable(
                        num_model_layers=model.num_layers,
                        moe_layers=layers,
                        num_experts=experts,
                        num_ranks=ranks,
                        ranks_per_node=per_node,
                    ),
                    placement,
                )


def difference(expected: NDArray[np.int64], found: NDArray[Any], what: str) -> str | None:
    """Return where two tables of slots differ."""
    if expected.shape != found.shape:
        return f"{what} has shape {found.shape}, placed were {expected.shape}"
    wrong = np.argwhere(expected != found)
    return f"{what} differs first at {wrong[0].tolist()}" if len(wrong) else None


def stand_in(name: str, **content: object) -> None:
    """Put a module of made-up content, and its parents, where imports find them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(content)


def loaded(name: str, path: Path) -> Any:
    """Return a module of a file, its package not imported."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def classes_of(path: Path, names: tuple[str, ...], scope: dict[str, object]) -> list[Any]:
    """Return assignments and classes of a file by name, run alone with the names of ``scope``."""
    found = []
    for node in ast.parse(path.read_text()).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if getattr(node, "name", None) in names or set(targets) & set(names):
            found.append(node)
    # Annotations are resolved in the module that a class names as its own.
    module = types.ModuleType(f"conformance_{path.stem}")
    sys.modules[module.__name__] = module
    vars(module).update({name: getattr(typing, name) for name in typing.__all__}, **scope)
    code = compile(ast.Module(body=found, type_ignores=[]), str(path), "exec", dont_inherit=True)
    exec(code, vars(module))
    return [getattr(module, name) for name in names]


def sglang_client(root: Path) -> Client:
    """SGLang's ``compute_initial_expert_location_metadata``, on every rank, with static dispatch."""
    state = SimpleNamespace(redundant=0, ep=1, nodes=1, path="", counts=(0, 0))
    stand_in(
        "sglang.srt.runtime_context",
        get_device=lambda: SimpleNamespace(device="cpu"),
        get_exec=lambda: SimpleNamespace(
            moe=SimpleNamespace(
                ep_join_mode="",
                ep_num_redundant_experts=state.redundant,
                ep_dispatch_algorithm="static",
                moe_a2a_backend="deepep",
                init_expert_location=state.path,
            )
        ),
        get_parallel=lambda: SimpleNamespace(
            ep_size=state.ep, nnodes=state.nodes, elastic_ep_initial_size=None, tp_size=state.ep
        ),
        get_resources=lambda: None,
    )
    stand_in("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
    module = loaded("sglang_expert_location", root / "sglang/srt/eplb/expert_location.py")
    config = module.ModelConfigForExpertLocation
    config.from_model_config = staticmethod(
        lambda _: config(num_layers=state.counts[0], num_logical_experts=state.counts[1])
    )

    def ask(path: Path, case: Case) -> str | None:
        placement, table = case.placement, case.table
        state.redundant = placement.num_slots - placement.num_experts
        state.ep, state.nodes = placement.num_ranks, placement.num_ranks // placement.ranks_per_node
        state.path, state.counts = str(path), (table.num_model_layers, placement.num_experts)
        for rank in (0, placement.num_ranks - 1):
            read = module.compute_initial_expert_location_metadata(None, moe_ep_rank=rank)
            rows = read.physical_to_logical_map.numpy()[list(table.moe_layers)]
            wrong = difference(placement.slots, rows, "physical_to_logical_map")
            chosen = read.logical_to_rank_dispatch_physical_map.numpy()[list(table.moe_layers)]
            wrong = wrong or _not_nearest(placement, chosen, rank)
            if wrong:
                return wrong
        return None

    return ask


def _not_nearest(placement: ExpertPlacement, chosen: NDArray[Any], rank: int) -> str | None:
    """Return where a rank does not use a copy of its own node although there is one."""
    node_of_slot = placement.rank_of_slot // placement.ranks_per_node
    here = rank // placement.ranks_per_node
    for layer, slots in enumerate(placement.slots):
        if (slots[chosen[layer]] != np.arange(placement.num_experts)).any():
            return f"layer {layer}: the copy chosen is of another expert"
        own = np.unique(slots[node_of_slot == here])
        far = own[node_of_slot[chosen[layer][own]] != here]
        if len(far):
            return f"layer {layer}: expert {far[0]} is fetched from another node than rank {rank}'s"
    return None


def vllm_client(root: Path) -> Client:
    """``EPLBConfig`` of vLLM, in the decorator of its configurations."""
    import pydantic
    from pydantic.dataclasses import dataclass

    scope: dict[str, object] = {
        "Field": pydantic.Field,
        "model_validator": pydantic.model_validator,
        "config": lambda cls: dataclass(cls, config=pydantic.ConfigDict(extra="forbid")),
    }
    names = ("EPLBPolicyOption", "EPLBCommunicatorBackend", "EPLBConfig")
    *_, config = classes_of(root / "vllm/config/parallel.py", names, scope)

    def ask(path: Path, case: Case) -> str | None:
        try:
            read = config(**json.loads(path.read_text()))
        except (pydantic.ValidationError, TypeError) as error:
            return str(error)
        extra = case.placement.num_slots - case.placement.num_experts
        return None if read.num_redundant_experts == extra else f"{read.num_redundant_experts} copies"

    return ask


def ascend_client(root: Path) -> Client:
    """``init_eplb_config`` of vLLM-Ascend: the expert map of every device, the copy each rank uses."""
    import logging

    import torch

    stand_in("vllm.logger", logger=logging.getLogger("vllm"))
    stand_in("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
    module = loaded("ascend_eplb_utils", root / "vllm_ascend/eplb/core/eplb_utils.py")

    def ask(path: Path, case: Case) -> str | None:
        placement = case.placement
        config = SimpleNamespace(expert_map_path=str(path), dynamic_eplb=False, num_redundant_experts=0)
        for layer in {0, placement.num_layers // 2, placement.num_layers - 1}:
            for rank in (0, placement.num_ranks - 1):
                moe = SimpleNamespace(
                    num_experts=placement.num_experts, ep_size=placement.num_ranks, ep_rank=rank
                )
                maps, own, used, copies = module.init_eplb_config(config, layer, moe)
                if copies != placement.num_slots - placement.num_experts:
                    return f"layer {layer}: {copies} copies"
                slots = placement.slots[layer].reshape(placement.num_ranks, -1)
                for device, row in enumerate(slots):
                    if not (maps[device].numpy()[row] == np.arange(len(row))).all():
                        return f"layer {layer}: device {device} holds other experts"
                if not torch.equal(own, maps[rank]):
                    return f"layer {layer}: rank {rank} has another device's map"
                if (placement.slots[layer][used.numpy()] != np.arange(placement.num_experts)).any():
                    return f"layer {layer}: rank {rank} uses slots of other experts"
        return None

    return ask


def trtllm_client(root: Path) -> Client:
    """TensorRT-LLM's ``MoeLoadBalancerConfig``, inside ``MoeConfig``."""
    import pydantic

    class StrictBaseModel(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")

    scope: dict[str, object] = {
        "StrictBaseModel": StrictBaseModel,
        "Field": pydantic.Field,
        "PrivateAttr": pydantic.PrivateAttr,
    }
    names = ("MoeLoadBalancerConfig", "MoeConfig")
    balancer, moe_config = classes_of(root / "tensorrt_llm/llmapi/llm_args.py", names, scope)

    def ask(path: Path, case: Case) -> str | None:
        placement = case.placement
        try:
            moe_config(backend="WIDEEP", load_balancer=str(path))
            read = balancer(**yaml.safe_load(path.read_text()))
            read.setup(ep_rank=0, ep_size=placement.num_ranks)
            rows = [read.get_layer_initial_global_assignments(each) for each in case.table.moe_layers]
        except (ValueError, KeyError, TypeError) as error:
            return str(error)
        if read.num_local_slots != placement.slots_per_rank:
            return f"{read.num_local_slots} slots a rank"
        return difference(placement.slots, np.asarray(rows), "initial_global_assignments")

    return ask


CLIENTS: dict[str, Callable[[Path], Client]] = {
    "sglang": sglang_client,
    "vllm": vllm_client,
    "vllm-ascend": ascend_client,
    "trtllm": trtllm_client,
}


if __name__ == "__main__":
    exit_with(main, _NEEDS)
