"""Speed of replace-one-block scoring and of ranking, in CPU seconds of one thread.

Scoring, 12 layers x 24 variants (6 expert counts x 4 windows), a short and a long set of equally many tokens. It is
run whole, layers read from the checkpoint as the stage does. The straightforward way is a full forward per variant over
both sets, with the model in memory, our own fast blocks and as many tokens at a time as scoring. Its forwards cost
about the same, so a sample of them is timed, half before and half after scoring, and the rest is counted. Both give the
same damages; the largest relative difference is in the record.

The ideal is the count of block forwards that prefix reuse leaves (``moesaic.search.score_blocks.scoring.num_steps``),
each at the speed of one block forward over both sets. A share above 1 is possible: the short sequences fit into every
window, so windows are not told apart there. ``block_forwards_told_apart`` counts only what the sets can tell apart, and
``share_of_told_apart`` is of that.

The second case is the size at which puzzletron's method was measured earlier on this kind of processor: 4 layers, 8
experts, hidden size 64, 28 variants, 2 x 512 tokens, 47 CPU seconds; its vocabulary is not known, ours is recorded.

Ranking, one layer of the first case on 4 x 512 tokens: what the stage does with a batch (attention, routing, expert
outputs, tally, mixture) over a plain forward of the block.

Run: python benchmarks/scoring_speed.py [--record FILE]
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bars import Bar, conclude, cpu_seconds
from torch import Tensor

from moesaic.data.batches import TokenSequence, make_batches
from moesaic.models import layers, loading, mxfp4
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS
from moesaic.models.streaming import LayerReader, StateOffloader
from moesaic.models.synthesis import Model, write_synthetic
from moesaic.search.prune_model.pruning import kept_experts
from moesaic.search.rank_experts.ranking import rank_layer
from moesaic.search.rank_experts.stage import NUM_SPARE
from moesaic.search.score_blocks import damage, scoring
from moesaic.search.score_blocks.scoring import Parent, Probe, Variant

CPU = torch.device("cpu")
PUZZLETRON_CPU_S = 47.0
RANKING_BARS = {"frequency": 1.5, "reap": 1.5, "removal_difference": 3.0}
LENGTHS = [32] * 64 + [256] * 8
"""Of the short and the long sequences."""
BATCH_TOKENS = 2048
"""Tokens that go through a block at once, on both sides."""
GROUP = 8
"""Variants that scoring takes through the later layers together, each with its share of these tokens."""
SAMPLED = 6


def make_probes(lengths: Sequence[int], batch_tokens: int, vocab: int) -> list[Probe]:
    """Random sequences whose second half is measured."""
    draw = torch.Generator().manual_seed(0)
    sequences = [
        TokenSequence(
            tuple(torch.randint(0, vocab, (length,), generator=draw).tolist()),
            tuple(place >= length // 2 for place in range(length)),
        )
        for length in lengths
    ]
    return [Probe.of(batch) for batch in make_batches(sequences, batch_tokens)]


def open_parent(checkpoint: Checkpoint, place: Path, longest: int) -> Parent:
    """As the stage does."""
    return Parent(
        checkpoint.architecture,
        LayerReader(checkpoint, torch.float32, CPU).load,
        loading.load_head(checkpoint),
        loading.rotary(checkpoint, longest),
        StateOffloader(2**32, place, CPU).offload,
    )


def score_all(
    checkpoint: Checkpoint, parent: Parent, probes: Sequence[Probe], variants: Sequence[Sequence[Variant]]
) -> list[list[damage.Metrics]]:
    """All layers, as the stage does; metrics over all probes."""
    tokens = [probe.batch.token_ids for probe in probes]
    states = [parent.offload(hidden) for hidden in loading.embed_each(checkpoint, tokens)]
    measurements = scoring.run_parent(parent, states, probes, on_steps=lambda _: None)
    states = [parent.offload(hidden) for hidden in loading.embed_each(checkpoint, tokens)]
    found = []
    for layer, offers in enumerate(variants):
        sums = scoring.score_layer(parent, layer, states, measurements, offers, GROUP, on_steps=lambda _: None)
        found.append([scoring.total(parts) for parts in sums])
        if layer < parent.last:
            states = scoring.advance(parent, layer, states)
    return found


class Straightforward:
    """The whole model in memory, run from tokens to metrics for every variant."""

    def __init__(self, checkpoint: Checkpoint, probes: Sequence[Probe]) -> None:
        self.checkpoint, self.probes = checkpoint, probes
        self.layers = [loading.load_block(checkpoint, layer) for layer in range(checkpoint.num_layers)]
        self.head = loading.load_head(checkpoint)
        self.rotary = loading.rotary(checkpoint, max(probe.batch.num_positions for probe in probes))
        self.embedded = loading.embed(checkpoint, [probe.batch.token_ids for probe in probes])
        self.references = [self.forward(probe) for probe in probes]

    def forward(self, probe: Probe, layer: int | None = None, variant: Variant | None = None) -> Tensor:
        """Final-norm hidden states at measured positions."""
        (hidden,) = loading.embed(self.checkpoint, [probe.batch.token_ids])
        for index, module in enumerate(self.layers):
            block, kept = self.checkpoint.architecture.blocks[index], None
            if variant is not None and index == layer:
                block, kept = variant.block, variant.kept
            hidden = layers.run_block(module, hidden, self.rotary, block.window, kept)
        return self.head.normed(hidden[probe.measured])

    def run_one_block(self) -> None:
        """The first block alone, over all sequences."""
        for hidden in self.embedded:
            layers.run_block(self.layers[0], hidden, self.rotary, None)

    def score(self, layer: int, variant: Variant) -> damage.Metrics:
        """One variant."""
        sums = [
            damage.compare(self.head, reference, states.unsqueeze(0), probe.next_ids, probe.weights)[0]
            for probe, reference in zip(self.probes, self.references, strict=True)
            for states in [self.forward(probe, layer, variant)]
        ]
        return scoring.total(sums)


def offers(num_layers: int, own: Block, counts: Sequence[int], windows: Sequence[int | None]) -> list[list[Variant]]:
    """Every count with every window, the whole block first; experts in the order of their ids."""
    order = range(own.num_experts)
    return [
        [
            Variant(replace(own, num_experts=count, window=window), kept_experts(order, count))
            for window in windows
            for count in counts
        ]
        for _ in range(num_layers)
    ]


def write_wide(directory: Path) -> Checkpoint:
    """The first case's model."""
    shape = ModelShape(GPT_OSS, 128, 8, 1, 64, 512, 131_072)
    write_synthetic(Model(shape, Architecture.of([Block(16, 4, 128)] * 12), 3), directory / "wide")
    return Checkpoint.open(directory / "wide")


def compare_with_straightforward(directory: Path) -> dict[str, Any]:
    """The first case."""
    checkpoint = write_wide(directory)
    variants = offers(12, checkpoint.architecture.blocks[0], (16, 14, 12, 10, 8, 4), (None, 128, 64, 32))
    probes = make_probes(LENGTHS, BATCH_TOKENS // GROUP, checkpoint.shape.vocab_size)
    whole = Straightforward(checkpoint, make_probes(LENGTHS, BATCH_TOKENS, checkpoint.shape.vocab_size))
    picks = [(layer, 1 + (7 * layer) % 23) for layer in range(0, 12, 12 // SAMPLED)]
    expected: dict[tuple[int, int], damage.Metrics] = {}

    def sample() -> None:
        for layer, index in picks:
            expected[layer, index] = whole.score(layer, variants[layer][index])

    sample_s, block_s = cpu_seconds(sample), cpu_seconds(whole.run_one_block, 5)
    parent = open_parent(checkpoint, directory / "wide-states", 256)
    found: list[list[damage.Metrics]] = []
    scoring_s = cpu_seconds(lambda: found.extend(score_all(checkpoint, parent, probes, variants)))
    block_s = min(block_s, cpu_seconds(whole.run_one_block, 5))
    straightforward_s = (sample_s + cpu_seconds(sample)) / 2 / len(picks) * sum(map(len, variants))
    worst = max(abs(found[i][j]["hidden_mse"] / expected[i, j]["hidden_mse"] - 1) for i, j in picks)
    ideal = scoring.num_steps([len(layer) for layer in variants])
    told = told_apart(probes, variants)
    return {
        "layers": 12,
        "variants_per_layer": 24,
        "tokens": sum(LENGTHS),
        "sequence_lengths": sorted(set(LENGTHS)),
        "tokens_per_forward": BATCH_TOKENS,
        "variants_together": GROUP,
        "straightforward_variants_timed": 2 * SAMPLED,
        "straightforward_cpu_s": straightforward_s,
        "block_forward_cpu_s": block_s,
        "scoring_cpu_s": scoring_s,
        "straightforward_over_scoring": straightforward_s / scoring_s,
        "block_forwards_ideal": ideal,
        "share_of_ideal": ideal * block_s / scoring_s,
        "block_forwards_told_apart": told,
        "share_of_told_apart": told * block_s / scoring_s,
        "largest_relative_difference_of_damage": float(f"{worst:.1e}"),
    }


def told_apart(probes: Sequence[Probe], variants: Sequence[Sequence[Variant]]) -> float:
    """Block forwards over both sets that prefix reuse and equal-looking variants leave, the parent's own not run."""
    tokens = [probe.batch.token_ids.numel() for probe in probes]
    return sum(
        (len(variants) - layer)
        * sum(
            count * (len({probe.sees(variant.block) for variant in offered}) - 1)
            for count, probe in zip(tokens, probes, strict=True)
        )
        / sum(tokens)
        for layer, offered in enumerate(variants)
    )


def compare_with_puzzletron(directory: Path) -> dict[str, Any]:
    """The second case; 28 variants are 7 per layer."""
    shape = ModelShape(GPT_OSS, 64, 8, 1, 64, 4480, 131_072)
    model = Model(shape, Architecture.of([Block(8, 4, 64, None if layer % 2 else 128) for layer in range(4)]), 2)
    write_synthetic(model, directory / "tiny")
    checkpoint = Checkpoint.open(directory / "tiny")
    probes = make_probes([512, 512], 256, shape.vocab_size)
    probes = [replace(probe, measured=probe.batch.is_token) for probe in probes]
    variants = [
        [Variant(Block(8, 4, 64, own.window), tuple(range(8)))]
        + [Variant(Block(count, 4, 64, own.window), tuple(range(count))) for count in (7, 6, 5, 4)]
        + [Variant(Block(count, 4, 64, 64), tuple(range(count))) for count in (8, 4)]
        for own in checkpoint.architecture.blocks
    ]

    def scored() -> None:
        parent = open_parent(checkpoint, directory / "tiny-states", 512)
        score_all(checkpoint, parent, probes, variants)

    seconds = cpu_seconds(scored)
    return {
        "layers": 4,
        "variants": sum(map(len, variants)),
        "tokens": 1024,
        "vocabulary": shape.vocab_size,
        "puzzletron_cpu_s_measured_earlier": PUZZLETRON_CPU_S,
        "scoring_cpu_s": round(seconds, 2),
        "puzzletron_over_scoring": PUZZLETRON_CPU_S / seconds,
    }


def rank_speed(directory: Path) -> dict[str, float]:
    """CPU seconds of ranking one layer over those of a plain forward, by criterion; needs the first case's model."""
    checkpoint = Checkpoint.open(directory / "wide")
    module, rotary = loading.load_block(checkpoint, 0), loading.rotary(checkpoint, 512)
    hidden = torch.randn(4, 512, 128, generator=torch.Generator().manual_seed(1))

    def rank(criterion: Any) -> None:
        attended = layers.attend(module, hidden, rotary, None)
        normed = module.post_attention_layernorm(attended).flatten(0, 1)
        routing = layers.route(module, normed, NUM_SPARE.get(criterion, 0))
        rank_layer(criterion, [routing])
        attended + routing.mixture().view_as(attended)

    actions: dict[str, Callable[[], Any]] = {"plain": lambda: layers.run_block(module, hidden, rotary, None)}
    actions |= {name: partial(rank, name) for name in RANKING_BARS}
    rounds = [{name: cpu_seconds(action) for name, action in actions.items()} for _ in range(9)]
    least = {name: min(times[name] for times in rounds) for name in actions}
    return {name: least[name] / least["plain"] for name in RANKING_BARS}


def unpack_speed() -> dict[str, float]:
    """Million MXFP4 values unpacked per CPU second."""
    blocks_, scales = torch.randint(0, 256, (4, 1024, 32, 16)).byte(), torch.randint(110, 130, (4, 1024, 32)).byte()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        seconds = cpu_seconds(partial(mxfp4.dequantize, blocks_, scales, dtype), 9)
        found[str(dtype).removeprefix("torch.")] = float(round(blocks_.numel() * 2 / seconds / 1e6))
    return found


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        whole, tiny = compare_with_straightforward(directory), compare_with_puzzletron(directory)
        ranking = rank_speed(directory)
    found = {
        "straightforward": whole,
        "puzzletron": tiny,
        "ranking_over_plain_forward": ranking,
        "unpacked_mvalues_per_cpu_s": unpack_speed(),
    }
    bars = [
        Bar("a full forward per variant over scoring, CPU seconds", whole["straightforward_over_scoring"], least=3),
        Bar("the ideal count of block forwards over scoring, CPU seconds", whole["share_of_ideal"], least=0.7),
        Bar("puzzletron, measured earlier, over scoring, CPU seconds", tiny["puzzletron_over_scoring"], least=8),
        *(
            Bar(f"ranking by {name} over a plain forward", ranking[name], most=most)
            for name, most in RANKING_BARS.items()
        ),
    ]
    conclude("python benchmarks/scoring_speed.py", bars, found, arguments.record)


if __name__ == "__main__":
    main()
