"""Routed experts of one rank: rows sorted by expert, two grouped products around SwiGLU, and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from meshwright.kernels.compiler import has_triton
from meshwright.kernels.grouped_gemm import grouped_gemm
from meshwright.kernels.permute import ExpertOrder, expert_order, permute_tokens, unpermute_tokens
from meshwright.profiler.device import Device
from meshwright.profiler.sampling import expert_loads, moe_shapes
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.limits import Shape, fits_moe, limits_of
from meshwright.profiler.suites.model_shapes import model_moe_shapes
from meshwright.profiler.suites.operands import main_precision, normal

__all__ = ["SUITE"]

_NAME = "grouped_gemm"


class _GroupedGemmSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        precision = main_precision(device, settings)
        limits = limits_of(device, precision)
        shapes = moe_shapes(settings.num_points("moe"), settings.seed, limits)
        if settings.model is not None:
            exact = model_moe_shapes(settings.model, settings.tensor_parallel)
            shapes += tuple(shape for shape in exact if fits_moe(shape, limits, is_exact=True))
        for shape in shapes:
            yield Case(
                suite=_NAME,
                operator="moe",
                precision=precision,
                shape=shape,
                prepare=partial(_prepare, shape, precision, device, settings.seed),
                # Without Triton experts take turns, and their products need the sizes on the host.
                is_capturable=has_triton(),
            )


SUITE: Suite = _GroupedGemmSuite()


def _prepare(shape: Shape, precision: str, device: Device, seed: int) -> Callable[[], object]:
    """Return the work of the rank that the routing loads most.

    With one expert parallel rank every token is there once and goes to ``top_k`` experts; with more, the rank
    holds the rows the dispatch has brought, one per expert. Exchanges between ranks are not part of it.
    """
    loads = _loads_of_busiest_rank(shape, seed)
    tokens, hidden = int(shape["num_tokens"]), int(shape["hidden_size"])
    width = int(shape["moe_ffn_hidden_size"]) // int(shape["tp"])
    choices = int(shape["top_k"]) if shape["ep"] == 1 else 1
    num_rows = int(loads.sum())
    generator = np.random.default_rng(seed)
    ids = generator.permutation(np.repeat(np.arange(len(loads)), loads)).reshape(-1, choices)
    x = normal((tokens if shape["ep"] == 1 else num_rows, hidden), precision, device)
    gate_up = normal((len(loads), 2 * width, hidden), precision, device)
    down = normal((len(loads), hidden, width), precision, device)
    weights = torch.full(
        (ids.shape[0], choices), 1.0 / choices, dtype=torch.float32, device=device.torch_name
    )
    order = expert_order(torch.from_numpy(ids).to(device.torch_name), len(loads))
    experts = _Experts(order, gate_up.transpose(1, 2), down.transpose(1, 2), weights)
    if device.is_gpu and has_triton():
        return partial(experts.fused, x)
    return partial(experts.one_by_one, x, loads.tolist())


def _loads_of_busiest_rank(shape: Shape, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    num_experts, ep = int(shape["num_experts"]), int(shape["ep"])
    num_rows = int(shape["num_tokens"]) * int(shape["top_k"])
    loads = expert_loads(num_rows, num_experts, float(shape["skew"]), np.random.default_rng(seed))
    by_rank = loads.reshape(ep, num_experts // ep)
    busiest: np.ndarray[tuple[int], np.dtype[np.int64]] = by_rank[int(by_rank.sum(axis=1).argmax())]
    return busiest


class _Experts:
    """The experts of one rank, and which row goes to which."""

    def __init__(
        self, order: ExpertOrder, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self._order = order
        self._gate_up = gate_up
        self._down = down
        self._weights = weights
        # Row of x and weight of each sorted row, for the experts in turn.
        sources = torch.argsort(order.destinations.reshape(-1))
        self._sources = sources // order.destinations.shape[1]
        self._sorted_weights = weights.reshape(-1)[sources].unsqueeze(1)

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        """Compute with our grouped kernels."""
        rows = permute_tokens(x, self._order)
        gate, up = grouped_gemm(rows, self._gate_up, self._order.group_sizes).chunk(2, dim=-1)
        rows = grouped_gemm(functional.silu(gate) * up, self._down, self._order.group_sizes)
        return unpermute_tokens(rows, self._order, self._weights)

    def one_by_one(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Compute one expert after the other."""
        parts = []
        for expert, rows in enumerate(torch.split(x[self._sources], sizes)):
            if len(rows):
                gate, up = (rows @ self._gate_up[expert]).chunk(2, dim=-1)
                parts.append((functional.silu(gate) * up) @ self._down[expert])
        weighted = torch.cat(parts) * self._sorted_weights.to(x.dtype)
        return torch.zeros_like(x).index_add_(0, self._sources, weighted)
