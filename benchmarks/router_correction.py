"""Does correcting the router without training make a pruned child better?

    python benchmarks/router_correction.py --runs runs/router_correction [--problems COUNT] [--record FILE]

A public report on gpt-oss-20b with 27 of 32 experts (100 questions) calls the router's biases stale after pruning, and
neutralising them a cure. What can be stale? With p the softmax over the logits of all experts, a child with the experts
K routes by p_e / sum_K p: exactly the parent's probabilities, given that the expert is one of K, and in their order. So
as long as the hidden states are the parent's, no bias and no scale brings the child closer to that (Gibbs' inequality),
and what all biases have in common cancels: subtracting their mean changes nothing. Three things remain:

1. Behind pruned layers the states are not the parent's.
2. A token whose expert is gone gets the next one, which the parent never mixed there, with its share of the weight.
3. Biases may be there for balance between experts that are gone; but all that is kept was trained with them.

Tried are, of every layer in turn, behind layers that are corrected already, on the tokens of calibration conversations:

    none      the child as pruned
    zero      no router biases
    routing   per kept expert a scale and a bias of its logit, by the cross-entropy to the parent's probabilities given
              K, at the parent's own states (1)
    chosen    the same to the parent's weights of its top experts, of those in K: a substitute should get none (2)
    states    the stage ``fit_routers``: the same by the squared distance to the parent's states behind the layer (all)

Children: 75 % and 50 % of the experts in every layer, and those that the search chose by counts and windows on three
disjoint draws of the calibration sets (``refinement_*``, unrefined). Fits are on the same draws, the stage's on short
conversations alone; KL is measured on the next draw. Asked the validation problems before any training, and compared
problem by problem with ``none``, are ``zero`` and ``states``; the latter and ``none`` also after distillation. Weights
are rounded as they are stored. Finished stages are not repeated.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bars import conclude
from jaxtyping import Float
from tiny_children import DATA, PARENT, ask, draw_probes, draw_rows, final_states, kl, prune
from torch import Tensor

from moesaic.core.progress import say
from moesaic.core.workbench import Workbench
from moesaic.data.batches import Batch
from moesaic.measure.paired import Verdicts, accuracy, average, difference
from moesaic.models import loading
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.layers import Rotary, attend, mix, router_of, router_scores
from moesaic.pipelines.recipes import tiny_cpu
from moesaic.recover.fit_routers.stage import FitRoutersConfig
from moesaic.search.probing import Probes
from moesaic.search.prune_model.run import PRUNING
from moesaic.stages import STAGES

DRAWS = 3
SEARCHED = Path(__file__).with_name("results") / "refinement_2-core-x86_2026-11-29.json"
CHILDREN = ("75 % of experts", "50 % of experts", "searched")
ARMS = ("none", "zero", "routing", "chosen", "states")
ASKED = {"pruned": ("none", "zero", "states"), "distilled": ("none", "states")}
"""With which corrections."""
MUCH_CUT = CHILDREN[1:]
"""The children that are asked: of the first all corrections are within a point of none."""
FITTED_ON = 4096
"""Tokens of each fit, at most."""
RIDGE = 1e-4
"""What the squares of biases, and of scales less 1, cost."""

Loss = Callable[[Float[Tensor, "token expert"]], Tensor]
"""Of a layer's logits."""


@dataclass(frozen=True)
class Shown:
    """The tokens of a draw, and the parent's states at every so many of them."""

    batches: Sequence[Batch]
    rotary: Rotary
    attended: Sequence[Float[Tensor, "token hidden"]]
    """Of every layer, behind its attention."""

    def some(self, states: Sequence[Float[Tensor, "batch time hidden"]]) -> Float[Tensor, "token hidden"]:
        """The states at the tokens that fits are on."""
        every = torch.cat([each[batch.is_token] for each, batch in zip(states, self.batches, strict=True)])
        return every[:: -(-len(every) // FITTED_ON)]


@dataclass(frozen=True)
class Seen:
    """What a layer of the parent and of its child see of the same tokens."""

    kept: Sequence[int]
    parent_logits: Float[Tensor, "token expert"]
    top_k: int
    logits: Float[Tensor, "token kept_expert"]
    """The child's, uncorrected."""


def main() -> None:
    """Prune and correct on each draw, measure on the next, ask them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/router_correction"), help="what is made (%(default)s)")
    parser.add_argument("--record", type=Path, help="where to write what was found")
    parser.add_argument("--problems", type=int, default=200, help="asked per task and effort (%(default)s)")
    given = parser.parse_args()
    bench = Workbench(given.runs)
    ranking = bench.run(
        STAGES["rank_experts"], tiny_cpu().rank_experts, parent=PARENT, calibration_short=DATA.calibration_short
    )
    children = {name: [_prune(bench, draw, name, ranking) for draw in range(DRAWS)] for name in CHILDREN}
    for child in {path for paths in children.values() for path in paths}:
        _correct(bench, 0, child, "zero", None)
    with ProcessPoolExecutor(DRAWS, get_context("spawn")) as pool:
        results = list(pool.map(partial(_measure, bench.directory, children), range(DRAWS)))
        made = {name: [paths[name] for paths, _ in results] for name in CHILDREN}
        damages = {name: [measured[name] for _, measured in results] for name in CHILDREN}
        bench.run(STAGES["generate_traces"], tiny_cpu().generate_traces, model=PARENT, prompts=DATA.prompts)
        pruned = {draw[arm] for name in MUCH_CUT for draw in made[name] for arm in ASKED["distilled"]}
        distilled = dict(zip(pruned, pool.map(partial(_distil, bench.directory), pruned), strict=True))
        models = {
            "pruned": {name: [{arm: draw[arm] for arm in ASKED["pruned"]} for draw in made[name]] for name in MUCH_CUT},
            "distilled": {
                name: [{arm: distilled[draw[arm]] for arm in ASKED["distilled"]} for draw in made[name]]
                for name in MUCH_CUT
            },
        }
        asked = {
            path for names in models.values() for draws in names.values() for draw in draws for path in draw.values()
        }
        solved = dict(zip(asked, pool.map(partial(_ask, bench.directory, given.problems), asked), strict=True))
    found = {
        "kl_held_out": damages,
        "first_layer_largest_change_of_a_bias": {
            name: [{arm: _moved(each["none"], path) for arm, path in each.items()} for each in draws]
            for name, draws in made.items()
        },
        "asked": {
            state: {
                name: _compare({arm: [solved[draw[arm]] for draw in draws] for arm in draws[0]})
                for name, draws in names.items()
            }
            for state, names in models.items()
        },
        "problems": f"validation, {given.problems} a task and effort",
    }
    conclude(" ".join(["python benchmarks/router_correction.py", *sys.argv[1:]]), (), found, given.record)


def _measure(
    directory: Path, children: Mapping[str, Sequence[Path]], draw: int
) -> tuple[dict[str, dict[str, Path]], dict[str, dict[str, float]]]:
    """Of one draw by child and arm the checkpoint, and its KL on the next draw."""
    bench = Workbench(directory)
    own, probes = (draw_probes(directory, number % DRAWS) for number in (draw, draw + 1))
    shown, references = _show_parent(own), final_states(PARENT, probes)
    made, damages = {}, {}
    for name in CHILDREN:
        made[name] = {arm: _correct(bench, draw, children[name][draw], arm, shown) for arm in ARMS}
        kept = directory / f"kl-{children[name][draw].name}-{draw}.json"
        if not kept.is_file():
            found = {arm: kl(path, probes, references) for arm, path in made[name].items()}
            kept.write_text(json.dumps(found))
        damages[name] = json.loads(kept.read_text())
        say(f"{name}, draw {draw}: {damages[name]}")
    return made, damages


def _prune(bench: Workbench, draw: int, name: str, ranking: Path) -> Path:
    """The child's checkpoint; uniform ones are the same for all draws."""
    whole = Checkpoint.open(PARENT).architecture.blocks
    if name == "searched":
        task = f"searched-{draw}"
        labels = json.loads(SEARCHED.read_text())["blocks"][draw]["unrefined"]
        blocks = [_block(own, label) for own, label in zip(whole, labels, strict=True)]
    else:
        task = name.split()[0]
        blocks = [replace(own, num_experts=int(task) * own.num_experts // 100) for own in whole]
    architecture = bench.directory / f"candidate-{task}"
    architecture.mkdir(exist_ok=True)
    path = architecture / "architecture.json"
    if not path.is_file():
        entries = [block.as_config() for block in blocks]
        path.write_text(json.dumps({"candidates": {"puzzle": {"blocks": entries}}}))
    return prune(bench, task, ranking, architecture)


def _block(own: Block, label: str) -> Block:
    """The parent's block with the experts and the window of a label."""
    parts = label.split("/")
    window = None if parts[-1] == "full" else int(parts[-1])
    return replace(own, num_experts=int(parts[0].removesuffix("e")), window=window)


def _correct(bench: Workbench, draw: int, child: Path, arm: str, fitted_on: Shown | None) -> Path:
    """The child's checkpoint with its router corrected; finished ones are kept."""
    if arm == "none":
        return child
    source, name = Checkpoint.open(child), f"{child.name}-{arm}{'' if arm == 'zero' else f'-{draw}'}"
    if arm == "states":
        config = FitRoutersConfig(tokens=FITTED_ON, max_tokens=1024, batch_tokens=8192)
        calibration = draw_rows(bench.directory, draw).calibration_short
        return bench.run(STAGES["fit_routers"], config, name, child=child, parent=PARENT, calibration=calibration)
    place = bench.directory / name
    if not place.is_dir():
        routers = _routers(source, arm, fitted_on) if fitted_on else _without_biases(source)
        rewrite_checkpoint(source, place, routers, {"router": arm})
    return place


def _distil(directory: Path, child: Path) -> Path:
    """A child, distilled as the demo does."""
    bench, recipe = Workbench(directory), tiny_cpu()
    traces = bench.run(STAGES["generate_traces"], recipe.generate_traces, model=PARENT, prompts=DATA.prompts)
    name = f"{child.name}-distilled"
    return bench.run(STAGES["distill"], recipe.distill, name, child=child, parent=PARENT, traces=traces)


def _without_biases(child: Checkpoint) -> dict[str, Tensor]:
    names = [f"model.layers.{layer}.mlp.router.bias" for layer in range(child.num_layers)]
    return {name: torch.zeros_like(child.tensor(name)) for name in names}


@torch.no_grad()
def _show_parent(probes: Probes) -> Shown:
    """Run the parent on a draw."""
    parent, batches = Checkpoint.open(PARENT), [probe.batch for probe in probes.all]
    rotary = loading.rotary(parent, max(batch.num_positions for batch in batches))
    shown, attended = Shown(batches, rotary, ()), []
    states = loading.embed(parent, [batch.token_ids for batch in batches])
    for layer, block in enumerate(parent.architecture.blocks):
        module = loading.load_block(parent, layer)
        states = [attend(module, each, rotary, block.window) for each in states]
        attended.append(shown.some(states))
        states = [mix(module, each) for each in states]
    return replace(shown, attended=attended)


@torch.no_grad()
def _routers(child: Checkpoint, arm: str, fitted_on: Shown) -> dict[str, Tensor]:
    """The corrected tensors by name, layer by layer, each behind those before."""
    parent, replaced = Checkpoint.open(PARENT), {}
    kept = json.loads((child.directory / PRUNING).read_text())["kept_experts"]
    states = loading.embed(parent, [batch.token_ids for batch in fitted_on.batches])
    for layer, block in enumerate(child.architecture.blocks):
        whole, cut = loading.load_block(parent, layer), loading.load_block(child, layer)
        states = [attend(cut, each, fitted_on.rotary, block.window) for each in states]
        router = router_of(cut)
        seen = _see(whole, cut, fitted_on.attended[layer], fitted_on.some(states), kept[layer])
        scale, bias = _fit(seen.logits, partial(LOSSES[arm], seen))
        router.weight.copy_(scale.unsqueeze(1) * router.weight)
        router.bias.copy_(scale * router.bias + bias)
        for name, tensor in (("weight", router.weight), ("bias", router.bias)):
            stored = tensor.to(child.tensor(f"model.layers.{layer}.mlp.router.{name}").dtype)
            tensor.copy_(stored)
            replaced[f"model.layers.{layer}.mlp.router.{name}"] = stored
        states = [mix(cut, each) for each in states]
    return replaced


def _see(whole: Any, cut: Any, theirs: Tensor, ours: Tensor, kept: Sequence[int]) -> Seen:
    """Show a layer the same tokens as its parent has them, and as the child has them."""
    return Seen(
        kept,
        router_scores(whole, whole.post_attention_layernorm(theirs)).choice,
        router_of(whole).top_k,
        router_scores(cut, cut.post_attention_layernorm(ours)).choice,
    )


def _to_routing(seen: Seen, logits: Tensor) -> Tensor:
    """Cross-entropy to the parent's probabilities, given the kept experts."""
    wanted = torch.softmax(seen.parent_logits[:, list(seen.kept)], dim=-1)
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean()


def _to_chosen(seen: Seen, logits: Tensor) -> Tensor:
    """Cross-entropy to the parent's weights of those of its top experts that are kept, where there are any."""
    least = seen.parent_logits.topk(seen.top_k, dim=-1).values[:, -1:]
    weights = seen.parent_logits.exp().where(seen.parent_logits >= least, 0.0)[:, list(seen.kept)]
    sums = weights.sum(-1, keepdim=True)
    wanted, some = weights / sums.clamp_min(1e-30), sums.squeeze(1) > 0
    return -(wanted * logits.log_softmax(-1))[some].sum(-1).mean()


LOSSES: Mapping[str, Callable[[Seen, Tensor], Tensor]] = {
    "routing": _to_routing,
    "chosen": _to_chosen,
}


@torch.enable_grad()
def _fit(logits: Float[Tensor, "token expert"], loss: Loss) -> tuple[Tensor, Tensor]:
    """Per expert the scale and the bias of its logit that minimise a loss."""
    scale, bias = torch.ones(logits.shape[1], requires_grad=True), torch.zeros(logits.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([scale, bias], max_iter=60, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(scale * logits + bias) + RIDGE * ((scale - 1).square().sum() + bias.square().sum())
        value.backward()
        return value

    optimizer.step(evaluate)
    return scale.detach(), bias.detach()


def _moved(child: Path, corrected: Path) -> float:
    """The largest change of a bias in the first layer, where both models have the same states."""
    name = "model.layers.0.mlp.router.bias"
    before, after = (Checkpoint.open(path).tensor(name).float() for path in (child, corrected))
    return float((after - before).abs().max())


def _ask(directory: Path, problems: int, child: Path) -> Verdicts:
    """Which validation problems a child solves, the mean over efforts."""
    return average(list(ask(Workbench(directory), child.name, child, problems).values()))


def _compare(solved: Mapping[str, Sequence[Verdicts]]) -> dict[str, Any]:
    """By arm and draw how a child answers, and what each correction is ahead of none: of each draw, and of all."""

    def compared(arm: str, draws: Sequence[int]) -> dict[str, Any]:
        corrected, plain = (average([solved[each][draw] for draw in draws]) for each in (arm, "none"))
        return asdict(difference(corrected, plain))

    every = range(DRAWS)
    return {
        "accuracy": {arm: [accuracy(verdicts) for verdicts in draws] for arm, draws in solved.items()},
        "minus_none": {
            arm: {f"draw {draw}": compared(arm, [draw]) for draw in every} | {"all": compared(arm, list(every))}
            for arm in solved
            if arm != "none"
        },
    }


if __name__ == "__main__":
    main()
