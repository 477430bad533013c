"""What do narrower experts cost, against fewer ones, and does a search that offers both find a better child?

    python benchmarks/expert_width.py --runs runs/expert_width [--budgets SHARE ...] [--record FILE]

Blocks. Every block of the tiny reasoner is replaced alone, by one without a quarter or a half of the experts'
parameters: whole experts, or the same share of every expert's channels. Channels are chosen by every criterion of
``rank_experts``. In MXFP4 32 channels share a scale; of halves it is measured what it costs to keep whole groups
(exact), and to keep the best channels and pack them anew (rounded). Damage is the KL from the parent.

Children. Two searches on the same scores and measured costs, under the same limits of memory, throughput and
parameters, one with fewer experts and windows on offer, one with half the width as well. Their children are pruned and
asked the validation problems before any training, and compared problem by problem. Finished stages are not repeated.
An empty ``--budgets`` leaves this part out.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from bars import conclude
from tiny_children import DATA, PARENT, ask_pruned
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer

from moesaic.core.process_group import BatchShare
from moesaic.core.workbench import Workbench
from moesaic.data.calibration import load_batches
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.models import layers, loading, mxfp4
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.stage_outputs import read_orders
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.search.probing import Probes, embed, open_parent
from moesaic.search.prune_model.pruning import kept_channels, kept_experts
from moesaic.search.rank_experts.channels import order_channels
from moesaic.search.rank_experts.stage import ChannelCriterion
from moesaic.search.score_blocks.scoring import (
    Measurement,
    Offloaded,
    Parent,
    Variant,
    advance,
    run_parent,
    score_layer,
    total,
)
from moesaic.search.space import SearchSpace
from moesaic.stages import STAGES

SHARES = (0.75, 0.5)
"""Of experts, or of their channels, that are kept."""
BUDGETS = (0.69, 0.55)
"""Parameters of a child, at most, as a share of its parent's; that of the demo's child is 0.69."""
SPACE = SearchSpace(expert_counts=(16, 12, 10, 8, 6), expert_widths=(32,), windows=(128,))
SCORES = tiny_cpu().score_blocks.but(space=SPACE)
ARMS = ("experts", "experts and width")
CRITERIA: tuple[ChannelCriterion, ...] = get_args(ChannelCriterion)
Variants = Mapping[str, Variant]


def main() -> None:
    """Measure every kind of variant in every layer, then search, prune and ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/expert_width"), help="what is made (%(default)s)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS, help="those of the children (%(default)s)")
    given = parser.parse_args()
    bench = Workbench(given.runs)
    ranking = bench.run(
        STAGES["rank_experts"], tiny_cpu().rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    found = {"blocks": _blocks(ranking, given.runs), "children": _children(bench, ranking, given.budgets)}
    conclude(" ".join(["python benchmarks/expert_width.py", *sys.argv[1:]]), (), found, given.record)


def _blocks(ranking: Path, scratch: Path) -> dict[str, Any]:
    """KL of every kind of variant, in every layer by itself; kept in a file."""
    kept = scratch / "blocks.json"
    if not kept.is_file():
        kept.write_text(json.dumps(_measured_blocks(ranking, scratch)))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def _measured_blocks(ranking: Path, scratch: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(PARENT)
    orders = read_orders(ranking / "ranking.json", checkpoint.architecture)
    sets = DATA.calibration_short, DATA.calibration_long
    probes = Probes.read(SCORES, checkpoint, *sets, SCORES.space.windows, SCORES.variants_per_batch)
    with open_parent(SCORES, checkpoint, probes, scratch, BatchShare()) as parent:
        measurements = run_parent(parent, embed(SCORES, checkpoint, parent, probes.all), probes.all, lambda _: None)
        states: Sequence[Offloaded] = embed(SCORES, checkpoint, parent, probes.all)
        rows = []
        for layer, (energies, norms) in enumerate(_energies(checkpoint)):
            offered = _offered(checkpoint, layer, orders[layer], energies, norms)
            rows.append(_score(parent, layer, states, measurements, offered, len(probes.short)))
            if layer < parent.last:
                states = advance(parent, layer, states)
    return {
        kind: {
            "kl": sum(sum(row[kind]) for row in rows),
            "kl_short": sum(row[kind][0] for row in rows),
            "kl_long": sum(row[kind][1] for row in rows),
            "kl_of_each_layer": [sum(row[kind]) for row in rows],
        }
        for kind in rows[0]
    }


def _children(bench: Workbench, ranking: Path, budgets: Sequence[float]) -> dict[str, Any]:
    """Of every budget the children of both searches, and the difference of what they solve."""
    if not budgets:
        return {}
    both = bench.run(
        STAGES["score_blocks"],
        SCORES,
        parent=PARENT,
        ranking=ranking,
        calibration_short=DATA.calibration_short,
        calibration_long=DATA.calibration_long,
    )
    costs = bench.run(STAGES["measure_costs"], tiny_cpu().measure_costs.but(space=SPACE), parent=PARENT)
    scores = {"experts": of_full_width(both, bench.directory / "scores-of-full-width"), "experts and width": both}
    found = {}
    for budget in budgets:
        solved, rows = {}, {}
        for arm in ARMS:
            name = f"{arm.replace(' ', '-')}-{budget}"
            config = tiny_cpu().search_architecture.but(
                max_experts_ratio=None, max_parameters_ratio=budget, random_seeds=(), frontier_points=2
            )
            chosen = bench.run(
                STAGES["search_architecture"], config, f"search-{name}", parent=PARENT, scores=scores[arm], costs=costs
            )
            solved[arm] = ask_pruned(bench, name, ranking, chosen)
            rows[arm] = _described(chosen, solved[arm])
        found[f"at most {budget:.0%} of the parameters"] = rows | {
            "width minus none": {
                effort: asdict(difference(solved["experts and width"][effort], solved["experts"][effort]))
                for effort in solved["experts"]
            }
            | {"mean": asdict(difference(*(average(list(solved[arm].values())) for arm in reversed(ARMS))))}
        }
    return found


def of_full_width(scores: Path, directory: Path) -> Path:
    """The same scores without the rows of narrower experts."""
    directory.mkdir(exist_ok=True)
    content = json.loads((scores / "scores.json").read_text())
    own = max(row["intermediate_size"] for row in content["rows"])
    content["rows"] = [row for row in content["rows"] if row["intermediate_size"] == own]
    (directory / "scores.json").write_text(json.dumps(content))
    return directory


def _described(chosen: Path, solved: Mapping[str, Verdicts]) -> dict[str, Any]:
    candidates = json.loads((chosen / "architecture.json").read_text())["candidates"]
    puzzle = candidates["puzzle"]
    return {
        "blocks": [Block.from_config(entry).label for entry in puzzle["blocks"]],
        **{key: value for key, value in puzzle.items() if key != "blocks"},
        "uniform_damage": candidates["uniform"]["damage"] if "uniform" in candidates else None,
        "accuracy": {effort: accuracy(verdicts) for effort, verdicts in solved.items()},
    }


def _energies(checkpoint: Checkpoint) -> list[tuple[Tensor, Tensor]]:
    """Of every layer the energies and norms of all channels, on the tokens that experts are ranked on."""
    config = tiny_cpu().rank_experts
    batches = load_batches(
        DATA.calibration_short,
        checkpoint.directory,
        max_sequences=config.max_sequences,
        max_tokens=config.max_tokens,
        batch_tokens=config.batch_tokens,
    )
    rotary = loading.rotary(checkpoint, max(batch.num_positions for batch in batches))
    states, found = loading.embed(checkpoint, [batch.token_ids for batch in batches]), []
    with torch.no_grad():
        for layer, own in enumerate(checkpoint.architecture.blocks):
            block, energies = loading.load_block(checkpoint, layer), []
            for index, batch in enumerate(batches):
                attended = layers.attend(block, states[index], rotary, own.window)
                routing = layers.route(block, block.post_attention_layernorm(attended[batch.is_token]))
                energies.append(routing.energies)
                states[index] = layers.mix(block, attended)
            found.append((torch.stack(energies).sum(0), layers.down_norms(block.mlp.experts)))
    return found


def _offered(checkpoint: Checkpoint, layer: int, order: Sequence[int], energies: Tensor, norms: Tensor) -> Variants:
    """What takes a block's place, by its name."""
    own = checkpoint.architecture.blocks[layer]
    offered = {}
    for share in SHARES:
        count, width = round(share * own.num_experts), round(share * own.expert_width)
        fewer = replace(own, num_experts=count)
        offered[f"{share:.0%} of experts"] = Variant(fewer, kept_experts(order, count))
        for criterion in CRITERIA:
            channels = order_channels(criterion, energies, norms, seed=layer).long()
            offered[f"{share:.0%} of channels, {criterion}"] = _narrower(own, order, kept_channels(channels, width))
    offered["50% of channels, whole groups of 32"] = _narrower(own, order, _best_groups(energies * norms))
    return offered


def _narrower(own: Block, order: Sequence[int], channels: Tensor) -> Variant:
    return Variant(replace(own, expert_width=channels.shape[1]), kept_experts(order, own.num_experts), channels)


def _best_groups(scores: Tensor) -> Tensor:
    """Half of every expert's groups of 32 channels."""
    groups = scores.unflatten(1, (-1, mxfp4.BLOCK))
    best = groups.sum(-1).topk(groups.shape[1] // 2, dim=-1).indices.sort(-1).values
    channels: Tensor = best.unsqueeze(-1) * mxfp4.BLOCK + torch.arange(mxfp4.BLOCK)
    return channels.flatten(1)


def _score(
    parent: Parent,
    layer: int,
    states: Sequence[Offloaded],
    measurements: Sequence[Measurement],
    offered: Variants,
    num_short: int,
) -> dict[str, tuple[float, float]]:
    """KL of every variant, on short and on long sequences; one is scored with its weights packed anew as well."""

    def score(some: Variants, loader: Parent) -> dict[str, tuple[float, float]]:
        one_by_one = [
            score_layer(loader, layer, states, measurements, [whole, variant], 1, lambda _: None, prove=False)[1]
            for variant in some.values()
        ]
        return {
            name: (total(sums[:num_short])["kl"], total(sums[num_short:])["kl"])
            for name, sums in zip(some, one_by_one, strict=True)
        }

    own = parent.architecture.blocks[layer]
    whole = Variant(own, tuple(range(own.num_experts)))
    best = offered["50% of channels, output_energy"]
    repacked = replace(parent, load=partial(_load_repacked, parent, layer, best.channels))
    return score(offered, parent) | score({"50% of channels, output_energy, packed anew": best}, repacked)


def _load_repacked(
    parent: Parent, replaced: int, channels: Tensor | None, layer: int, then: int | None = None
) -> GptOssDecoderLayer:
    """Load a layer; the replaced one has its kept channels packed anew."""
    module = parent.load(layer, then=then)
    if layer == replaced and channels is not None:
        each = torch.arange(len(channels)).unsqueeze(1)
        kept = module.mlp.experts.down_proj[each, channels].transpose(1, 2).contiguous()
        down = module.mlp.experts.down_proj.clone()
        down[each, channels] = mxfp4.dequantize(*mxfp4.quantize(kept)).transpose(1, 2)
        module.mlp.experts.down_proj.data = down
    return module


if __name__ == "__main__":
    main()
