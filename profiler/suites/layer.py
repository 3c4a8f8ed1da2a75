"""One transformer layer, eager and compiled: a check of what the fitted operators add up to.

What the eager layer takes longer gives the factor of its element-wise kernels (profiler/eager_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from meshwright.profiler.device import Device
from meshwright.profiler.settings import ProfileSettings
from meshwright.profiler.suites.base import Case, Suite
from meshwright.profiler.suites.operands import dtype_of, main_precision, normal

__all__ = ["SUITE", "Layer", "LayerShape"]

_NAME = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Widths of one layer, tokens of a training step and of a decode step; fields as in a model."""

    hidden_size: int = 4096
    ffn_hidden_size: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    batch_size: int = 1
    sequence_length: int = 4096
    decode_batch_size: int = 64
    context_length: int = 2048

    @property
    def num_parameters(self) -> int:
        """Weights of the four projections and the two norms."""
        attention = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.num_heads * self.head_dim
        return self.hidden_size * (attention + 3 * self.ffn_hidden_size + 2)


_SMALL = LayerShape(
    hidden_size=128,
    ffn_hidden_size=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    sequence_length=64,
    decode_batch_size=4,
    context_length=128,
)


class _LayerSuite:
    name = _NAME

    def cases(self, device: Device, settings: ProfileSettings) -> Iterator[Case]:
        shape = LayerShape() if device.is_gpu else _SMALL
        model = settings.model
        # A CPU cannot wait for a layer of a large model, and latent attention is another layer.
        if model is not None and model.mla is None and model.is_gated_mlp and device.is_gpu:
            shape = LayerShape(
                hidden_size=model.hidden_size,
                ffn_hidden_size=model.ffn_hidden_size,
                num_heads=model.num_attention_heads,
                num_kv_heads=model.num_query_groups,
                head_dim=model.head_dim,
            )
        # That of the other suites, so that their operators add up to it.
        precision = main_precision(device, settings)
        training = {"batch_size": shape.batch_size, "sequence_length": shape.sequence_length}
        decoding = {"batch_size": shape.decode_batch_size, "context_length": shape.context_length}
        # For a CPU the compiler writes C++ and takes minutes.
        for is_compiled in (False, True) if settings.compiles_layer and device.is_gpu else (False,):
            build = partial(_build, shape, precision, device, is_compiled=is_compiled)
            flag = {"compiled": int(is_compiled)}
            yield _case("forward", precision, shape, training | flag, partial(_forward, build))
            yield _case("backward", precision, shape, training | flag, partial(_backward, build))
            yield _case("decode", precision, shape, decoding | flag, partial(_decode, build))
        yield _case("optimizer", "fp32", shape, {}, partial(_optimizer, shape.num_parameters, device))


SUITE: Suite = _LayerSuite()


class Layer(nn.Module):
    """RMSNorm, grouped-query attention with rotary positions, RMSNorm, SwiGLU; with both residuals."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.shape = shape
        heads, kv_heads, width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.hidden_size)
        self.query_key_value = nn.Linear(shape.hidden_size, (heads + 2 * kv_heads) * width, bias=False)
        self.output = nn.Linear(heads * width, shape.hidden_size, bias=False)
        self.mlp_norm = nn.RMSNorm(shape.hidden_size)
        self.gate_up = nn.Linear(shape.hidden_size, 2 * shape.ffn_hidden_size, bias=False)
        self.down = nn.Linear(shape.ffn_hidden_size, shape.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return the layer's output (batch, tokens, hidden); with a cache, of one token after the cached ones."""
        shape = self.shape
        batch, length, _ = x.shape
        projected = self.query_key_value(self.attention_norm(x)).view(batch, length, -1, shape.head_dim)
        query, key, value = projected.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=2)
        query, key = _rotated(query, cosine, sine), _rotated(key, cosine, sine)
        if cache is None:
            attended = functional.scaled_dot_product_attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                is_causal=True,
                enable_gqa=shape.num_heads != shape.num_kv_heads,
            ).transpose(1, 2)
        else:
            keys, values = cache
            keys[:, :, -1:] = key.transpose(1, 2)
            values[:, :, -1:] = value.transpose(1, 2)
            grouped = query.reshape(batch, shape.num_kv_heads, -1, shape.head_dim)
            attended = functional.scaled_dot_product_attention(grouped, keys, values)
        x = x + self.output(attended.reshape(batch, length, -1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        result: torch.Tensor = x + self.down(functional.silu(gate) * up)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class _Built:
    """A layer on its device, as it is called."""

    shape: LayerShape
    precision: str
    device: Device
    parameters: tuple[nn.Parameter, ...]
    call: Callable[..., torch.Tensor]

    def inputs(self, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tokens and the rotary tables of their positions."""
        x = normal((batch, length, self.shape.hidden_size), self.precision, self.device)
        cosine, sine = (
            normal((length, 1, self.shape.head_dim), self.precision, self.device) for _ in range(2)
        )
        return x, cosine, sine


def _build(shape: LayerShape, precision: str, device: Device, *, is_compiled: bool) -> _Built:
    layer = Layer(shape).to(device=device.torch_name, dtype=dtype_of(precision, device))
    return _Built(
        shape=shape,
        precision=precision,
        device=device,
        parameters=tuple(layer.parameters()),
        call=torch.compile(layer) if is_compiled else layer,
    )


def _forward(build: Callable[[], _Built]) -> Callable[[], object]:
    built = build()
    inputs = built.inputs(built.shape.batch_size, built.shape.sequence_length)

    def forward() -> torch.Tensor:
        # With gradients: a training step's forward pass, which keeps what backward needs.
        return built.call(*inputs)

    return forward


def _backward(build: Callable[[], _Built]) -> Callable[[], object]:
    from torch._functorch import config

    built = build()
    x, cosine, sine = built.inputs(built.shape.batch_size, built.shape.sequence_length)
    x.requires_grad_()
    # Or the compiled backward pass would give its inputs away, and could run only once.
    with config.patch(donated_buffer=False):
        out = built.call(x, cosine, sine)
        gradient = torch.randn_like(out)
        backward = partial(torch.autograd.grad, out, (x, *built.parameters), gradient, retain_graph=True)
        backward()
    return backward


def _decode(build: Callable[[], _Built]) -> Callable[[], object]:
    built = build()
    shape = built.shape
    inputs = built.inputs(shape.decode_batch_size, 1)
    size = (shape.decode_batch_size, shape.num_kv_heads, shape.context_length, shape.head_dim)
    cache = (normal(size, built.precision, built.device), normal(size, built.precision, built.device))

    def step() -> torch.Tensor:
        with torch.no_grad():
            return built.call(*inputs, cache)

    return step


def _optimizer(num_parameters: int, device: Device) -> Callable[[], object]:
    """Return the fused step over the layer's master weights."""
    parameter = nn.Parameter(torch.randn(num_parameters, device=device.torch_name))
    parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, fused=True, capturable=device.is_gpu)
    optimizer.step()
    return optimizer.step


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


def _case(
    name: str,
    precision: str,
    shape: LayerShape,
    tokens: Mapping[str, int],
    prepare: Callable[[], Callable[[], object]],
) -> Case:
    widths = {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }
    return Case(
        suite=_NAME,
        operator="layer",
        precision=precision,
        shape={"name": name, **widths, **tokens},
        prepare=prepare,
        is_capturable=name in ("decode", "optimizer"),
    )
