"""Routing drawn from a model of routers, for planning before there is a trace; it proves no gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meshwright.errors import SpecError
from meshwright.planner.placement.routing import RoutingData, routing_from_tokens

__all__ = ["SyntheticRouting", "draw_routing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticRouting:
    """How the generator draws.

    Parameters
    ----------
    popularity_sigma : float
        Spread of the experts' log-normal popularity. 0.8 gives the hottest expert of 256 about 2 % of the pairs
        and the 32 hottest about a third, as DeepSeek-V3's layers have on GPQA (moe-balance, analysis notebook);
        1.02 the imbalance TensorRT-LLM published for DeepSeek-R1 (examples/ep_load_balancer).
    topic_strength : float
        Added to the logits of the experts of a token's topic; 1.5 is weak, 3 is strong.
    persistence : float
        Probability that a token keeps its topic from one layer to the next (Markov); 0.7 is weak, 0.9 strong.
    experts_per_topic : int
        Experts of a topic in each layer.
    topic_run : int
        Consecutive tokens that start with the same topic (locality of a text); 1 draws each for itself.
    """

    popularity_sigma: float = 0.8
    topic_strength: float = 1.5
    persistence: float = 0.7
    experts_per_topic: int = 8
    topic_run: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.persistence <= 1.0:
            raise SpecError(f"synthetic routing: persistence is a probability, not {self.persistence:g}")
        if self.popularity_sigma < 0.0 or self.topic_strength < 0.0:
            raise SpecError("synthetic routing: popularity_sigma and topic_strength are 0 or more")
        if self.experts_per_topic < 1 or self.topic_run < 1:
            raise SpecError("synthetic routing: experts_per_topic and topic_run are at least 1")


def draw_routing(
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    seed: int,
    spec: SyntheticRouting | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> RoutingData:
    """Draw a trace: log-normal popularity, Markov topics over the layers, Gumbel noise, top-k.

    Parameters
    ----------
    num_layers, num_experts, top_k, num_tokens : int
        Shape of the trace.
    seed : int
        Same seed, same trace.
    spec : SyntheticRouting | None
        Strength of each effect; the weak defaults when None.
    num_groups, top_groups : int
        Group-limited routing: only experts of the ``top_groups`` best groups, a group being as good as its two
        best experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Returns
    -------
    RoutingData
        The trace, marked synthetic.
    """
    if min(num_layers, num_experts, top_k, num_tokens) < 1 or top_k > num_experts or num_experts % num_groups:
        raise SpecError(
            f"synthetic routing: cannot draw top-{top_k} of {num_experts} experts in {num_groups} groups for "
            f"{num_tokens} tokens of {num_layers} layers"
        )
    spec = spec or SyntheticRouting()
    generator = np.random.default_rng(seed)
    num_topics = max(2, num_experts // spec.experts_per_topic) if num_experts > 1 else 1
    runs = -(-num_tokens // spec.topic_run)
    topic = np.repeat(generator.integers(num_topics, size=runs), spec.topic_run)[:num_tokens]
    tokens = np.empty((num_layers, num_tokens, top_k), dtype=np.int16)
    for layer in range(num_layers):
        if layer:
            stays = generator.random(num_tokens) < spec.persistence
            topic = np.where(stays, topic, generator.integers(num_topics, size=num_tokens))
        popularity = generator.normal(0.0, spec.popularity_sigma, num_experts)
        topic_of_expert = generator.permutation(num_experts) * num_topics // num_experts
        # Gumbel noise: minus the logarithm of an exponential variable.
        logits = generator.standard_exponential((num_tokens, num_experts), dtype=np.float32)
        np.log(np.maximum(logits, 1e-30, out=logits), out=logits)
        np.negative(logits, out=logits)
        bonus = popularity + spec.topic_strength * (topic_of_expert == np.arange(num_topics)[:, None])
        logits += bonus.astype(np.float32)[topic]
        if top_groups < num_groups:
            grouped = logits.reshape(num_tokens, num_groups, -1)
            best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
            chosen = np.argpartition(-best, top_groups - 1, axis=1)[:, :top_groups]
            is_open = np.zeros((num_tokens, num_groups), dtype=bool)
            np.put_along_axis(is_open, chosen, True, axis=1)
            logits = np.where(is_open[:, :, None], grouped, -np.inf).reshape(num_tokens, num_experts)
        tokens[layer] = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    return routing_from_tokens(tokens, num_experts, f"synthetic routing (seed {seed})", is_synthetic=True)
