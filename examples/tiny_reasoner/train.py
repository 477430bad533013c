"""Train the tiny reasoner: `python -m examples.tiny_reasoner.train --out DIR --steps N`.

The same command resumes from DIR/checkpoint.pt and continues with the same numbers. Every length in the schedule is a
fraction of `--steps`: linear warm-up, a plateau, a linear decay to zero, and the last part trained through the stored
MXFP4 weights.
"""

import argparse
import json
import os
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GptOssForCausalLM

from examples.tiny_reasoner import tasks
from examples.tiny_reasoner.model import build_model
from examples.tiny_reasoner.optimizer import build_optimizers
from examples.tiny_reasoner.quantized import stored_weights
from examples.tiny_reasoner.rows import Cell, Curriculum, Rows, RowWriter, echo_rows, far_rows, short_rows, write_turn
from examples.tiny_reasoner.tasks import EFFORTS, FAMILIES, FAR_FAMILIES
from examples.tiny_reasoner.tokenizer import render_system


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    steps: int = 5400
    tokens_per_step: int = 4096
    seed: int = 1
    muon_lr: float = 0.004
    adam_lr: float = 0.002
    warmup: float = 0.02
    decay_from: float = 0.45
    quantize_from: float = 0.88
    balance: float = 0.003
    echo: float = 0.08
    clip: float = 1.0
    level_threshold: float = 0.25
    level_step: float = 0.1


@dataclass
class State:
    """What a checkpoint holds besides weights and optimisers."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curriculum: Curriculum = field(default_factory=Curriculum)
    rng: random.Random = field(default_factory=random.Random)


class BalanceLoss:
    """The usual load-balance term, from the routers' logits of the last forward pass."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        self.top_k = model.config.num_experts_per_tok
        self.logits: list[Tensor] = []
        for layer in model.model.layers:
            layer.mlp.router.register_forward_hook(self._collect)

    def _collect(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        self.logits.append(output[0])

    def pop(self) -> Tensor:
        """experts * sum_e (share of tokens sent to e) * (mean probability of e), averaged over layers; 1 when even."""
        terms = []
        for logits in self.logits:
            num_experts = logits.shape[-1]
            chosen = torch.bincount(logits.topk(self.top_k).indices.flatten(), minlength=num_experts)
            share = chosen.float() / chosen.sum()
            terms.append(num_experts * (share * logits.softmax(-1).mean(0)).sum())
        self.logits = []
        return torch.stack(terms).mean()


@dataclass(frozen=True)
class Measured:
    """One micro-batch: which answers were wholly right, and the mean loss of every family's answers."""

    exact: list[tuple[Cell, bool]]
    loss: dict[str, list[float]]


def measure(rows: Rows, logits: Tensor, token_loss: Tensor, chosen: Tensor) -> Measured:
    """Score each answer; logits, token_loss and chosen (indices into the flat rows) cover the written tokens."""
    turn = rows.turn.flatten()[chosen]
    wrong = (logits.argmax(-1) != rows.labels.flatten()[chosen]).float()
    count = len(rows.turns)
    wrong_tokens = torch.zeros(count, device=logits.device).index_add_(0, turn, wrong).tolist()
    sums = torch.zeros(count, device=logits.device).index_add_(0, turn, token_loss.detach())
    means = (sums / torch.bincount(turn, minlength=count)).tolist()
    loss: dict[str, list[float]] = defaultdict(list)
    for item, mean in zip(rows.turns, means, strict=True):
        loss[item.cell[0]].append(mean)
    return Measured([(item.cell, bad == 0) for item, bad in zip(rows.turns, wrong_tokens, strict=True)], loss)


def written_loss(model: GptOssForCausalLM, rows: Rows) -> tuple[Tensor, Measured]:
    """Summed cross-entropy over what the assistant wrote; the head runs on those positions only."""
    documents = None if rows.single else rows.documents
    output = model.model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, documents=documents)
    hidden = output.last_hidden_state
    chosen = (rows.labels.flatten() != -100).nonzero().squeeze(1)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, chosen))
    token_loss = F.cross_entropy(logits, rows.labels.flatten()[chosen], reduction="none")
    return token_loss.sum(), measure(rows, logits, token_loss, chosen)


def draw_rows(recipe: Recipe, state: State) -> list[Rows]:
    """The micro-batches of one step: short rows and far rows, about `tokens_per_step` in all."""
    far_tokens = round(recipe.tokens_per_step * state.curriculum.far_share() / 512) * 512
    num_short = (recipe.tokens_per_step - far_tokens) // 256
    rows = [short_rows(state.rng, state.curriculum, num_short), far_rows(state.rng, state.curriculum, far_tokens)]
    if state.step < recipe.echo * recipe.steps:
        rows.append(echo_rows(state.rng, recipe.tokens_per_step // 4))
    return rows


def rate_factor(recipe: Recipe, progress: float) -> float:
    """The learning rate's fraction of its peak."""
    warm = min(1.0, (progress + 1 / recipe.steps) / recipe.warmup)
    return warm * min(1.0, (1 - progress) / (1 - recipe.decay_from))


class Trainer:
    """Holds the model, its optimisers and the state, and moves them one step at a time."""

    def __init__(self, recipe: Recipe, device: str, out: Path) -> None:
        self.recipe, self.device, self.out = recipe, device, out
        self.model = build_model(recipe.seed, device)
        self.optimizers = build_optimizers(self.model, recipe.muon_lr, recipe.adam_lr)
        self.balance = BalanceLoss(self.model)
        self.state = State(rng=random.Random(recipe.seed))

    def step(self) -> dict[str, list[float]]:
        """One update; returns the losses per family."""
        recipe, state = self.recipe, self.state
        progress = state.step / recipe.steps
        parts = [rows.to(self.device) for rows in draw_rows(recipe, state)]
        num_written = sum(int((rows.labels != -100).sum()) for rows in parts)
        num_tokens = sum(rows.ids.numel() for rows in parts)
        losses: dict[str, list[float]] = defaultdict(list)
        with stored_weights(self.model, enabled=progress >= recipe.quantize_from):
            for rows in parts:
                loss, measured = written_loss(self.model, rows)
                balance = recipe.balance * self.balance.pop() * rows.ids.numel() / num_tokens
                (loss / num_written + balance).backward()
                state.curriculum.observe(measured.exact)
                for family, values in measured.loss.items():
                    losses[family] += values
        self._update(rate_factor(recipe, progress))
        state.curriculum.advance(progress, recipe.level_threshold, recipe.level_step)
        state.step, state.tokens = state.step + 1, state.tokens + num_tokens
        return losses

    def _update(self, factor: float) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old or the new one, never half of one."""
        state = asdict(self.state) | {"rng": self.state.rng.getstate()}
        payload = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "state": state, "recipe": asdict(self.recipe),
        }  # fmt: skip
        partial = self.out / "checkpoint.partial"
        torch.save(payload, partial)
        os.replace(partial, self.out / "checkpoint.pt")

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            return
        payload = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(payload["model"])
        for optimizer, saved in zip(self.optimizers, payload["optimizers"], strict=True):
            base = [group["base_lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["base_lr"] = rate
        state = payload["state"]
        rng = random.Random()
        rng.setstate(state["rng"])
        self.state = State(state["step"], state["tokens"], state["seconds"], Curriculum(**state["curriculum"]), rng)


def probe_rows(seed: int, family: str, effort: tasks.Effort, count: int) -> Rows:
    """Development problems from the train side, as the test asks them, one a row."""
    rng = random.Random(f"{seed}{family}")
    length = 512 if family in FAR_FAMILIES else 128
    writer = RowWriter(count, length)
    for row in range(count):
        if not write_turn(writer, tasks.draw_problem(rng, family, "train"), effort, render_system(effort)):
            raise ValueError(f"a {family} problem does not fit {length} tokens")
        if row + 1 < count:
            writer.next_row()
    return writer.rows()


@torch.no_grad()
def probe(trainer: Trainer, count: int) -> dict[str, float]:
    """Share of answers that greedy decoding would write exactly as the reference, analysis included."""
    accuracy = {}
    with stored_weights(trainer.model):
        for family in FAMILIES:
            for effort in EFFORTS:
                size = count // 2 if family in FAR_FAMILIES else count
                rows = probe_rows(trainer.recipe.seed + 1000, family, effort, size)
                _, measured = written_loss(trainer.model, rows.to(trainer.device))
                accuracy[f"{family}/{effort}"] = sum(ok for _, ok in measured.exact) / len(measured.exact)
    trainer.balance.logits = []
    return accuracy


def log_line(path: Path, line: dict[str, object]) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def summary(trainer: Trainer, losses: dict[str, list[float]], tokens_per_s: float) -> dict[str, object]:
    """One log line."""
    state, curriculum = trainer.state, trainer.state.curriculum
    return {
        "step": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "tokens_per_s": round(tokens_per_s),
        "lr": round(trainer.optimizers[0].param_groups[0]["lr"], 6),
        "far_share": round(state.curriculum.far_share(), 2),
        "loss": {family: round(sum(values) / len(values), 4) for family, values in sorted(losses.items())},
        "exact": {f"{family}/{effort}": round(1 - error, 2) for (family, effort), error in curriculum.error.items()},
        "level": {family: round(level, 2) for family, level in curriculum.level.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Cadence:
    """How often things beside training happen, in steps."""

    log: int = 20
    save: int = 150
    probe: int = 300
    probe_count: int = 64


def train(trainer: Trainer, cadence: Cadence, stop_at: int | None = None) -> None:
    """Run to the end of the recipe, or to `stop_at` steps."""
    losses: dict[str, list[float]] = defaultdict(list)
    began, began_tokens = time.monotonic(), trainer.state.tokens
    while trainer.state.step < min(trainer.recipe.steps, stop_at or trainer.recipe.steps):
        start = time.monotonic()
        for family, values in trainer.step().items():
            losses[family] += values
        trainer.state.seconds += time.monotonic() - start
        step = trainer.state.step
        if step % cadence.log == 0:
            rate = (trainer.state.tokens - began_tokens) / (time.monotonic() - began)
            log_line(trainer.out / "log.jsonl", summary(trainer, losses, rate))
            losses, began, began_tokens = defaultdict(list), time.monotonic(), trainer.state.tokens
        if step % cadence.save == 0:
            trainer.save()
        if step % cadence.probe == 0:
            log_line(trainer.out / "log.jsonl", {"step": step, "probe": probe(trainer, cadence.probe_count)})
    trainer.save()


def parse_arguments() -> argparse.Namespace:
    """Every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint and log.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that everything runs")
    parser.add_argument("--stop-at", type=int, help="stop after this many steps; the same command without it continues")
    for item in fields(Recipe):
        parser.add_argument("--" + item.name.replace("_", "-"), type=item.type, default=item.default)
    return parser.parse_args()


def main() -> None:
    """Train, or continue to."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    recipe = Recipe(**{item.name: getattr(arguments, item.name) for item in fields(Recipe)})
    cadence = Cadence()
    if arguments.smoke:
        recipe = Recipe(steps=6, tokens_per_step=2048, seed=recipe.seed)
        cadence = Cadence(log=1, save=3, probe=6, probe_count=4)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe, arguments.device, arguments.out)
    trainer.resume()
    train(trainer, cadence, arguments.stop_at)


if __name__ == "__main__":
    main()
