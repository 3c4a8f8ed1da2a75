"""Expert placement beside EPLB: balance, chain locality, joint, traffic, grouping, layouts, exact oracles, DeepEP.

    python benchmarks/placement.py [balance chain joint traffic grouping layout oracle dispatch]

All routing is synthetic (the generator of meshwright.planner.placement.synthetic, seeds below): the figures compare
methods and prove no gain on a real model. Times are CPU seconds of this process; the first call of a kernel compiles it.
Set OMP_NUM_THREADS=1 to keep linear algebra on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import numpy as np
from numpy.typing import NDArray

from meshwright.costmodels.parallelism.dispatch import (
    LOW_LATENCY_DISPATCH,
    exchange_time,
    expected_places,
    full_traffic,
)
from meshwright.planner.placement.balance import balance_grouped_layer, balance_layer, balance_slots
from meshwright.planner.placement.certificates import packing_bound
from meshwright.planner.placement.chain import alternate_often, chain_weight, slots_of_ranks
from meshwright.planner.placement.chain_bounds import chain_bound
from meshwright.planner.placement.chain_partitions import best_partitions
from meshwright.planner.placement.eplb import eplb_layer, eplb_slots
from meshwright.planner.placement.evaluation import (
    layer_chain_weights,
    measure,
)
from meshwright.planner.placement.exact import exact_balance, exact_chain, exact_replicated_balance
from meshwright.planner.placement.job import PlacementFlags, read_placement_job, with_layout
from meshwright.planner.placement.joint_choice import choose_layout
from meshwright.planner.placement.request import PlacementRequest
from meshwright.planner.placement.routing import split_held_out, token_transitions
from meshwright.planner.placement.simulation import job_calibration
from meshwright.planner.placement.solving import solve_placement
from meshwright.planner.placement.spread import spread_slots
from meshwright.planner.placement.synthetic import SyntheticRouting, draw_routing
from meshwright.planner.placement.token_groups import speculative_grouping
from meshwright.planner.placement.training import training_options
from meshwright.simcore.domain.expert_placement import ExpertPlacement

STRONG = SyntheticRouting(topic_strength=3.0, persistence=0.9)
WEAK = SyntheticRouting()
SEEDS = range(5)
# deepseek-ai/EPLB, README: 16 slots, 4 groups, 2 nodes, 8 GPUs; the optima are by enumeration.
README = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
README_OPTIMA = ((136.0, 151.0), (172.0, 179.5))
# (experts, ranks, slots, layers)
BALANCE = (
    (256, 32, 288, 58), (256, 36, 288, 58), (256, 64, 320, 58), (256, 72, 288, 58), (256, 144, 288, 58),
    (256, 320, 320, 58), (384, 48, 432, 20), (384, 64, 448, 20), (384, 320, 640, 20), (128, 8, 136, 20),
    (128, 32, 160, 20),
)  # fmt: skip
# (name, layers, experts, top-k, ranks)
CHAIN = (
    ("Mixtral, 1 per rank", 32, 8, 2, 8), ("Mixtral, 2 per rank", 32, 8, 2, 4), ("Qwen3-30B", 48, 128, 8, 16),
    ("Qwen3-235B", 94, 128, 8, 32), ("DeepSeek-V3, 32 ranks", 58, 256, 8, 32), ("DeepSeek-V3, 64 ranks", 58, 256, 8, 64),
)  # fmt: skip
# DeepEP, README: ranks, then latency [us] and bandwidth [GB/s] of dispatch and of combine.
DEEPEP = (
    (8, 77, 98, 114, 127), (16, 118, 63, 195, 74), (32, 155, 48, 273, 53), (64, 173, 43, 314, 46),
    (128, 192, 39, 369, 39), (256, 194, 39, 360, 40),
)  # fmt: skip


def heaviest(loads: NDArray[np.float64], slots: NDArray[np.int64], num_ranks: int) -> float:
    counts = np.maximum(np.bincount(slots, minlength=len(loads)), 1)
    return float((loads / counts)[slots].reshape(num_ranks, -1).sum(axis=1).max())


def balance() -> None:
    print("EPLB README instance: heaviest rank by EPLB, ours, optimum (global; groups on nodes)")
    for layer, loads in enumerate(README):
        free, grouped = balance_layer(loads, 16, 8), balance_grouped_layer(loads, 16, 8, 4, 2)
        print(
            f"  layer {layer}: {heaviest(loads, eplb_layer(loads, 16, 1, 1, 8), 8):g} {heaviest(loads, free, 8):g} "
            f"{README_OPTIMA[layer][0]:g}; {heaviest(loads, eplb_layer(loads, 16, 4, 2, 8), 8):g} "
            f"{heaviest(loads, grouped, 8):g} {README_OPTIMA[layer][1]:g}"
        )
    print("\nBalance, log-normal popularity 0.8, seed 0: heaviest rank over the mean, mean / worst layer")
    for experts, ranks, slots, layers in BALANCE:
        loads = np.random.default_rng(0).lognormal(0.0, 0.8, (layers, experts))
        theirs = eplb_slots(loads, slots, 1, 1, ranks)
        started = time.process_time()
        ours = balance_slots(loads, slots, ranks)
        seconds = time.process_time() - started
        before, after = (
            np.array([heaviest(w, s, ranks) * ranks / w.sum() for w, s in zip(loads, each, strict=True)])
            for each in (theirs, ours)
        )
        floor = np.mean([packing_bound(w, slots, ranks) * ranks / w.sum() for w in loads])
        cut = 1.0 - (after.mean() - 1.0) / (before.mean() - 1.0)
        print(
            f"  {experts} experts, {ranks:3d} ranks, {slots} slots ({slots // ranks} each): EPLB {before.mean():.4f} / "
            f"{before.max():.4f}  ours {after.mean():.4f} / {after.max():.4f}  bound {floor:.4f}  residual cut {cut:6.1%}"
            f"  worse layers {int((after > before * (1 + 1e-12)).sum())}  {seconds:.1f} s",
            flush=True,
        )


def chain() -> None:
    print("Chain, strong affinity, 8,192 tokens, seed 0: locality, certified bound, gap")
    for name, layers, experts, top_k, ranks in CHAIN:
        routing = draw_routing(layers, experts, top_k, 8192, 0, STRONG)
        assert routing.tokens is not None
        transitions = token_transitions(routing.tokens, experts)
        total = transitions.sum()
        started = time.process_time()
        if experts == 8:
            best = best_partitions(transitions, routing.loads, ranks, np.full(layers, np.inf))
        else:
            best = alternate_often(transitions, ranks, 0)
        solved = time.process_time()
        kept = chain_weight(transitions, best)
        placement = ExpertPlacement(
            slots=slots_of_ranks(best), num_experts=experts, num_ranks=ranks, ranks_per_node=ranks
        )
        bound = chain_bound(transitions, ranks, layer_chain_weights(placement, transitions))
        certified = time.process_time()
        # Every partition was tried: what is kept is the optimum, whatever the relaxation says.
        note = ", optimal (all partitions): true gap 0" if experts == 8 else ""
        print(
            f"  {name:22s} {kept / total:.4f}  bound {bound / total:.4f}  gap {1 - kept / bound:6.2%}{note}  placed in "
            f"{solved - started:.1f} s, certified in {certified - solved:.1f} s",
            flush=True,
        )


def joint() -> None:
    print(
        "Joint, 16,384 tokens to solve and 16,384 to judge: locality and imbalance on held-out tokens, median of seeds 0 to 4"
    )
    cases = (
        ("Mixtral-like", 32, 8, 2, 4),
        ("Qwen3-30B-like", 48, 128, 8, 16),
        ("DeepSeek-V3-like", 58, 256, 8, 32),
    )
    for name, layers, experts, top_k, ranks in cases:
        rows = []
        for seed in SEEDS:
            routing = draw_routing(layers, experts, top_k, 32_768, seed, STRONG)
            answer = solve_placement(
                PlacementRequest(
                    routing=routing, num_slots=experts, num_ranks=ranks, ranks_per_node=min(8, ranks), top_k=top_k,
                    objective="joint", dispatch="coherent", seed=seed,
                ),
                certificates=False,
            )  # fmt: skip
            ours, theirs = answer.held_out, answer.baseline_held_out
            assert ours is not None
            assert theirs is not None
            assert ours.locality
            assert theirs.locality
            rows.append((theirs.locality, theirs.imbalance, ours.locality, ours.imbalance))
        gain = np.median([row[2] / row[0] for row in rows])
        points = np.median([100.0 * (row[3] - row[1]) for row in rows])
        medians = np.median(rows, axis=0)
        print(
            f"  {name:18s} EPLB {medians[0]:.4f} / {medians[1]:.4f}  ours {medians[2]:.4f} / {medians[3]:.4f}  "
            f"locality x {gain:.2f}, imbalance {points:+.2f} points",
            flush=True,
        )


def traffic() -> None:
    print(
        "Remote nodes per token on held-out tokens, 4 nodes of 8, top-8 of 256, 16,384 tokens each, median of seeds 0 to 4"
    )
    for name, spec in (("weak", WEAK), ("strong", STRONG)):
        for redundant in (0, 32, 96):
            rows = []
            for seed in SEEDS:
                routing, judge = split_held_out(draw_routing(1, 256, 8, 32_768, seed, spec))
                assert judge is not None
                assert routing.tokens is not None
                slots = 256 + redundant
                theirs, ours = (
                    ExpertPlacement(slots=each, num_experts=256, num_ranks=32, ranks_per_node=8)
                    for each in (
                        eplb_slots(routing.loads, slots, 1, 1, 32),
                        spread_slots(routing.tokens, routing.loads, slots, 32, 8, slack=0.01),
                    )
                )
                drawn, near, mine = (
                    measure(theirs, judge, choice="random"), measure(theirs, judge), measure(ours, judge),
                )  # fmt: skip
                rows.append(
                    (
                        drawn.remote_nodes_per_token, near.remote_nodes_per_token, mine.remote_nodes_per_token,
                        drawn.imbalance, mine.imbalance, mine.node_imbalance,
                    )
                )  # fmt: skip
            table = np.array(rows, dtype=np.float64)
            medians = np.median(table, axis=0)
            gain = np.median(table[:, 2] / table[:, 0] - 1.0)
            print(
                f"  {name:6s} {redundant:3d} redundant: EPLB any copy {medians[0]:.3f}, nearest {medians[1]:.3f}; ours "
                f"{medians[2]:.3f} ({gain:+.1%}); imbalance EPLB {medians[3]:.3f}, ours {medians[4]:.3f}, node {medians[5]:.3f}",
                flush=True,
            )


def grouping() -> None:
    print(
        "Tokens grouped (Speculative-MoE), 4 nodes of 8, top-8 of 256, 4 layers, 16,384 tokens to learn from and to judge,"
        " median of seeds 0 to 4: remote nodes per token, share of pairs at home"
    )
    for name, spec in (("weak", WEAK), ("strong", STRONG)):
        for redundant in (0, 32):
            rows = []
            for seed in SEEDS:
                routing, judge = split_held_out(draw_routing(4, 256, 8, 32_768, seed, spec))
                assert judge is not None
                assert routing.tokens is not None
                assert judge.tokens is not None
                slots = 256 + redundant
                theirs, ours = (
                    ExpertPlacement(slots=each, num_experts=256, num_ranks=32, ranks_per_node=8)
                    for each in (
                        eplb_slots(routing.loads, slots, 1, 1, 32),
                        spread_slots(routing.tokens, routing.loads, slots, 32, 8, slack=0.01),
                    )
                )
                drawn, grouped = (
                    speculative_grouping(each, routing.tokens, judge.tokens) for each in (theirs, ours)
                )
                # The first layer has none before that foretells it.
                cells = (
                    drawn.by_chance,
                    drawn.grouped,
                    grouped.by_chance,
                    grouped.grouped,
                    grouped.foreknown,
                )
                rows.append(
                    [
                        value
                        for each in cells
                        for value in (each.remote_nodes[1:].mean(), each.local_pairs[1:].mean())
                    ]
                    + [drawn.by_chance.imbalance[1:].mean(), grouped.grouped.imbalance[1:].mean()]
                )
            medians = np.median(np.asarray(rows), axis=0)
            pairs = [f"{medians[2 * each]:.3f} / {medians[2 * each + 1]:.3f}" for each in range(5)]
            print(
                f"  {name:6s} {redundant:3d} redundant: EPLB {pairs[0]}, grouped {pairs[1]}; ours {pairs[2]}, grouped "
                f"{pairs[3]} ({medians[6] / medians[0] - 1.0:+.1%} nodes), known before {pairs[4]}; imbalance EPLB "
                f"{medians[10]:.3f}, ours grouped {medians[11]:.3f}",
                flush=True,
            )


def layout() -> None:
    print("Ranks, slots, capacity and overlap chosen together, 4,096 tokens per GPU, strong affinity, seed 0")
    for model, cluster in (
        ("mixtral-8x7b", "dgx-h100:2"),
        ("qwen3-235b-a22b", "dgx-h200:4"),
        ("deepseek-v3", "dgx-h200:4"),
    ):
        flags = PlacementFlags(model=model, cluster=cluster, synthetic="strong", is_choosing=True)
        job = read_placement_job(flags)
        calibration = job_calibration(job)
        started = time.process_time()
        choice = choose_layout(job, calibration)
        seconds = time.process_time() - started
        best = choice.best
        print(
            f"  {model} on {cluster}: ep {best.ep}, {best.redundant_experts} redundant, capacity "
            f"{best.capacity_factor or 'none'}, overlap {best.overlap_degree}: {best.layer_seconds * 1e6:,.0f} us a layer, "
            f"{best.weight_bytes / 1e9:.0f} GB; {len(choice.candidates)} candidates in {seconds:.1f} s"
        )
        print("    " + "\n    ".join(choice.reasons))
        whole = with_layout(job, best.ep, 0, job.request.routing)
        options = training_options(whole, calibration, 4096)
        cells = ", ".join(f"{each.name} {each.layer_seconds * 1e6:,.0f} us" for each in options[:4])
        print(f"    training on ep {best.ep}: {cells}", flush=True)


def oracle() -> None:
    print("Heuristics against integer programming on random small instances: equal / closed / tried")
    generator = np.random.default_rng(7)
    tally = {"balance": [0, 0, 0], "balance with copies": [0, 0, 0], "chain": [0, 0, 0]}

    def note(name: str, is_proven: bool, exact: float, ours: float) -> None:
        row = tally[name]
        row[2] += 1
        row[1] += is_proven
        row[0] += is_proven and abs(ours / exact - 1.0) < 1e-9

    for index in range(48):
        experts, ranks = ((8, 4), (9, 3), (12, 3), (12, 4), (10, 5), (6, 2))[index % 6]
        loads = generator.lognormal(0.0, 0.8, experts)
        answer = exact_balance(loads, ranks)
        note(
            "balance",
            answer.is_proven,
            answer.value,
            heaviest(loads, balance_layer(loads, experts, ranks), ranks),
        )
    for index in range(40):
        experts, ranks, slots = ((6, 4, 8), (5, 3, 9), (6, 3, 9), (4, 3, 6))[index % 4]
        loads = generator.lognormal(0.0, 0.8, experts)
        answer = exact_replicated_balance(loads, slots, ranks)
        ours = heaviest(loads, balance_layer(loads, slots, ranks), ranks)
        note("balance with copies", answer.is_proven, answer.value, ours)
    for index in range(36):
        layers, experts, ranks = ((4, 8, 2), (3, 6, 3), (4, 6, 2), (3, 8, 4))[index % 4]
        spec = SyntheticRouting(topic_strength=2.0, persistence=0.8, experts_per_topic=2)
        routing = draw_routing(layers, experts, 2, 1000, index, spec)
        assert routing.tokens is not None
        transitions = token_transitions(routing.tokens, experts)
        answer = exact_chain(transitions, ranks)
        note(
            "chain",
            answer.is_proven,
            answer.value,
            chain_weight(transitions, alternate_often(transitions, ranks, 40)),
        )
    for name, (equal, closed, tried) in tally.items():
        print(f"  {name:20s} {equal} / {closed} / {tried}")


def dispatch() -> None:
    print("DeepEP low latency: bytes and latency, model over published - 1")
    worst_bytes = worst_time = 0.0
    for ranks, *published in DEEPEP:
        cells = []
        for element, latency, bandwidth in ((1.03125, *published[:2]), (2.0, *published[2:])):
            traffic = full_traffic(128, 7168, element, 8, ranks, 8)
            num_bytes = traffic.between_nodes + traffic.inside_node
            of_bytes = num_bytes / (latency * 1e-6 * bandwidth * 1e9) - 1.0
            of_time = exchange_time(traffic, LOW_LATENCY_DISPATCH) / (latency * 1e-6) - 1.0
            worst_bytes, worst_time = max(worst_bytes, abs(of_bytes)), max(worst_time, abs(of_time))
            cells.append(f"bytes {of_bytes:+.1%} latency {of_time:+.1%}")
        print(f"  {ranks:3d} ranks: dispatch {cells[0]}; combine {cells[1]}")
    print(f"  worst: bytes {worst_bytes:.1%}, latency {worst_time:.1%}, from three constants")
    print("Expected distinct nodes under uniform routing, formula against 200,000 drawn tokens")
    generator = np.random.default_rng(0)
    for experts, top_k, nodes, groups, chosen in (
        (256, 8, 4, 1, 1),
        (256, 8, 8, 8, 4),
        (256, 8, 4, 8, 4),
        (128, 8, 4, 1, 1),
        (8, 2, 2, 1, 1),
    ):
        formula = expected_places(experts, top_k, nodes, groups, chosen)
        drawn = monte_carlo_places(generator, experts, top_k, nodes, groups, chosen)
        print(
            f"  {experts} experts, top-{top_k}, {nodes} nodes, {chosen} of {groups} groups: {formula:.4f} {drawn:.4f} ({formula / drawn - 1:+.2%})"
        )


def monte_carlo_places(
    generator: np.random.Generator, experts: int, top_k: int, nodes: int, groups: int, chosen: int
) -> float:
    scores = generator.random((200_000, experts), dtype=np.float32)
    if chosen < groups:
        order = np.argpartition(generator.random((len(scores), groups)), chosen - 1, axis=1)[:, :chosen]
        is_open = np.zeros((len(scores), groups), dtype=bool)
        np.put_along_axis(is_open, order, True, axis=1)
        scores = np.where(np.repeat(is_open, experts // groups, axis=1), scores, 2.0)
    drawn = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k] * nodes // experts
    hits = np.zeros((len(scores), nodes), dtype=bool)
    np.put_along_axis(hits, drawn, True, axis=1)
    return float(hits.sum(axis=1).mean())


SECTIONS: dict[str, Callable[[], None]] = {
    "balance": balance,
    "chain": chain,
    "joint": joint,
    "traffic": traffic,
    "grouping": grouping,
    "layout": layout,
    "oracle": oracle,
    "dispatch": dispatch,
}


def main() -> None:
    """Run the sections named, or all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("section", nargs="*", choices=[[], *SECTIONS], help=f"of {', '.join(SECTIONS)}")
    for name in parser.parse_args().section or SECTIONS:
        SECTIONS[name]()
        print()


if __name__ == "__main__":
    main()
