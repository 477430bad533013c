"""Train an example's model: `python -m examples.tiny_reasoner.train --out DIR --steps N`.

The same command resumes from DIR/checkpoint.pt and continues with the same numbers. Every length in the schedule is a
fraction of `--steps`: linear warm-up, a plateau, a linear decay to zero, and the last part trained through the stored
MXFP4 weights. `--init PARENT` begins with a stored parent's weights and every level open. A step consists of shards,
which `--processes` share; their gradients are summed, so the number of processes changes nothing but rounding.
"""

import argparse
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from transformers import GptOssForCausalLM

from examples.tiny_reasoner.model import build_model
from examples.tiny_reasoner.optimizer import build_optimizers
from examples.tiny_reasoner.quantized import stored_weights
from examples.tiny_reasoner.rows import (
    SHORT_ROW,
    Curriculum,
    Result,
    Rows,
    RowWriter,
    echo_rows,
    exchange,
    far_rows,
    short_rows,
)
from examples.tiny_reasoner.suite import EFFORTS, Effort, Suite
from examples.tiny_reasoner.tasks import SUITE
from examples.tiny_reasoner.workers import Workers, connect
from moesaic.models.whole_model import load_model


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; `mixed`: products in bfloat16, fast on processors that have it."""

    steps: int = 5400
    tokens_per_step: int = 4096
    shards: int = 1
    seed: int = 1
    muon_lr: float = 0.004
    adam_lr: float = 0.002
    warmup: float = 0.02
    decay_from: float = 0.45
    quantize_from: float = 0.88
    balance: float = 0.003
    echo: float = 0.08
    clip: float = 1.0
    mixed: bool = False
    level_threshold: float = 0.25
    level_step: float = 0.1


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


def measure(rows: Rows, logits: Tensor, token_loss: Tensor, chosen: Tensor) -> list[Result]:
    """Score each answer; logits, token_loss and chosen (indices into the flat rows) cover the learnt tokens."""
    turn, count = rows.turn.flatten()[chosen], len(rows.turns)
    wrong = (logits.argmax(-1) != rows.labels.flatten()[chosen]) & rows.sure.flatten()[chosen]
    wrong_tokens = torch.zeros(count, device=logits.device).index_add_(0, turn, wrong.float()).tolist()
    sums = torch.zeros(count, device=logits.device).index_add_(0, turn, token_loss.detach()).tolist()
    tokens = torch.bincount(turn, minlength=count).tolist()
    return [
        Result(item.cell, bad == 0, total / size, size)
        for item, bad, total, size in zip(rows.turns, wrong_tokens, sums, tokens, strict=True)
    ]


def learnt_loss(model: GptOssForCausalLM, rows: Rows, mixed: bool = False) -> tuple[Tensor, list[Result]]:
    """Summed cross-entropy over what is learnt; the head runs on those positions only."""
    documents = None if rows.single else rows.documents
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        output = model.model(input_ids=rows.ids, position_ids=rows.positions, use_cache=False, documents=documents)
    hidden = output.last_hidden_state
    chosen = (rows.labels.flatten() != -100).nonzero().squeeze(1)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, chosen))
    token_loss = F.cross_entropy(logits, rows.labels.flatten()[chosen], reduction="none")
    return token_loss.sum(), measure(rows, logits, token_loss, chosen)


def draw_rows(recipe: Recipe, curriculum: Curriculum, step: int, shard: int) -> list[Rows]:
    """The micro-batches of one shard of a step: short rows and far rows, about `tokens_per_step / shards` in all."""
    rng = random.Random(f"{recipe.seed} {step} {shard}")
    num_tokens = recipe.tokens_per_step // recipe.shards
    far_tokens = round(num_tokens * curriculum.far_share() / 512) * 512
    rows = [short_rows(rng, curriculum, num_tokens - far_tokens), far_rows(rng, curriculum, far_tokens)]
    if step < recipe.echo * recipe.steps:
        rows.append(echo_rows(rng, num_tokens // 4))
    return rows


def rate_factor(recipe: Recipe, progress: float) -> float:
    """The learning rate's fraction of its peak."""
    warm = min(1.0, (progress + 1 / recipe.steps) / recipe.warmup)
    return warm * min(1.0, (1 - progress) / (1 - recipe.decay_from))


class Trainer:
    """Holds the model, its optimisers and the state, and moves them one step at a time."""

    def __init__(self, recipe: Recipe, suite: Suite, device: str, out: Path, workers: Workers | None = None) -> None:
        self.recipe, self.suite, self.device, self.out = recipe, suite, device, out
        self.workers = workers or Workers()
        self.model = build_model(suite.config(), recipe.seed, device)
        self.optimizers = build_optimizers(self.model, recipe.muon_lr, recipe.adam_lr, recipe.mixed, self.workers)
        self.balance = BalanceLoss(self.model)
        self.curriculum = Curriculum(suite)
        self.num_steps, self.num_tokens, self.seconds = 0, 0, 0.0

    def step(self) -> list[Result]:
        """One update; returns what was measured on all shards."""
        recipe, workers = self.recipe, self.workers
        progress = self.num_steps / recipe.steps
        shards = {
            shard: [rows.to(self.device) for rows in draw_rows(recipe, self.curriculum, self.num_steps, shard)]
            for shard in range(workers.rank, recipe.shards, workers.count)
        }
        parts = [rows for drawn in shards.values() for rows in drawn]
        counts = [sum(int((rows.labels != -100).sum()) for rows in parts), sum(rows.ids.numel() for rows in parts)]
        num_learnt, num_tokens = workers.sum(torch.tensor(counts)).tolist()
        results: dict[int, list[Result]] = {shard: [] for shard in shards}
        with stored_weights(self.model, enabled=progress >= recipe.quantize_from):
            for shard, drawn in shards.items():
                for rows in drawn:
                    loss, measured = learnt_loss(self.model, rows, recipe.mixed)
                    balance = recipe.balance * self.balance.pop() * rows.ids.numel() / num_tokens
                    (loss / num_learnt + balance).backward()
                    results[shard] += measured
        self._update(rate_factor(recipe, progress))
        gathered = [result for shard in workers.merge(results) for result in shard]
        self.curriculum.observe(gathered)
        self.curriculum.advance(progress, recipe.level_threshold, recipe.level_step)
        self.num_steps, self.num_tokens = self.num_steps + 1, self.num_tokens + num_tokens
        return gathered

    def _update(self, factor: float) -> None:
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.workers.count > 1:
            total = self.workers.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, total.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def begin_from(self, parent: Path) -> None:
        """Take a stored parent's weights; what it was trained on counts as learnt, so that every level is open."""
        self.model.load_state_dict(load_model(parent).state_dict())
        self.curriculum.level = dict.fromkeys(self.suite.families, 1.0)

    def save(self) -> None:
        """Write the checkpoint so that a crash leaves the old or the new one, never half of one."""
        if self.workers.rank:
            return
        payload = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "curriculum": self.curriculum.values(), "recipe": asdict(self.recipe),
            "steps": self.num_steps, "tokens": self.num_tokens, "seconds": self.seconds,
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
        self.curriculum.restore(payload["curriculum"])
        self.num_steps, self.num_tokens, self.seconds = (payload[name] for name in ("steps", "tokens", "seconds"))


def probe_rows(suite: Suite, seed: int, family: str, effort: Effort, count: int) -> Rows:
    """Development problems from the train side, as the test asks them, one a row."""
    rng = random.Random(f"{seed}{family}")
    writer = RowWriter(count, 512 if family in suite.far else SHORT_ROW)
    for row in range(count):
        if row:
            writer.next_row()
        problem = suite.draw_problem(rng, family, "train")
        exchange((family, effort), problem.question, problem.answer, problem.trace(effort, rng)).write(writer)
    return writer.rows()


@torch.no_grad()
def probe(trainer: Trainer, count: int) -> dict[str, float]:
    """Share of answers whose determined words all come first, the analysis included, as the test asks."""
    accuracy = {}
    with stored_weights(trainer.model):
        for family in trainer.suite.families:
            for effort in EFFORTS:
                size = count // 2 if family in trainer.suite.far else count
                rows = probe_rows(trainer.suite, trainer.recipe.seed + 1000, family, effort, size)
                _, results = learnt_loss(trainer.model, rows.to(trainer.device))
                accuracy[f"{family}/{effort}"] = sum(result.exact for result in results) / len(results)
    trainer.balance.logits = []
    return accuracy


def log_line(path: Path, line: dict[str, object]) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def mean_losses(results: Iterable[Result]) -> dict[str, float]:
    """The mean loss of every family's answers."""
    losses: dict[str, list[float]] = defaultdict(list)
    for result in results:
        losses[result.cell[0]].append(result.loss)
    return {family: round(sum(values) / len(values), 4) for family, values in sorted(losses.items())}


def shares_of(results: Sequence[Result]) -> dict[Effort, float]:
    """Each effort's part of the learnt tokens, exercises left out."""
    tokens = dict.fromkeys(EFFORTS, 0)
    for result in results:
        if result.cell[0] != "echo":
            tokens[result.cell[1]] += result.tokens
    return {effort: round(count / max(1, sum(tokens.values())), 3) for effort, count in tokens.items()}


def summary(trainer: Trainer, results: Sequence[Result], tokens_per_s: float) -> dict[str, object]:
    """One log line."""
    curriculum = trainer.curriculum
    return {
        "step": trainer.num_steps,
        "tokens": trainer.num_tokens,
        "seconds": round(trainer.seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "tokens_per_s": round(tokens_per_s),
        "lr": round(trainer.optimizers[0].param_groups[0]["lr"], 6),
        "far_share": round(curriculum.far_share(), 2),
        "loss_share": shares_of(results),
        "loss": mean_losses(results),
        "exact": {f"{family}/{effort}": round(1 - error, 2) for (family, effort), error in curriculum.error.items()},
        "level": {family: round(level, 2) for family, level in curriculum.level.items()},
    }  # fmt: skip


@dataclass(frozen=True)
class Cadence:
    """How often things beside training happen: in steps, and checkpoints in seconds."""

    log: int = 20
    save_s: float = 240.0
    probe: int = 300
    probe_count: int = 64


def train(trainer: Trainer, cadence: Cadence, stop_at: int | None = None) -> None:
    """Run to the end of the recipe, or to `stop_at` steps."""
    results: list[Result] = []
    began = saved = time.monotonic()
    began_tokens = trainer.num_tokens
    log = trainer.out / "log.jsonl"
    while trainer.num_steps < min(trainer.recipe.steps, stop_at or trainer.recipe.steps):
        start = time.monotonic()
        results += trainer.step()
        trainer.seconds += time.monotonic() - start
        step, is_first = trainer.num_steps, trainer.workers.rank == 0
        if step % cadence.log == 0:
            rate = (trainer.num_tokens - began_tokens) / (time.monotonic() - began)
            if is_first:
                log_line(log, summary(trainer, results, rate))
            results, began, began_tokens = [], time.monotonic(), trainer.num_tokens
        if time.monotonic() - saved > cadence.save_s:
            trainer.save()
            saved = time.monotonic()
        if step % cadence.probe == 0 and is_first:
            log_line(log, {"step": step, "probe": probe(trainer, cadence.probe_count)})
    trainer.save()


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    recipe: Recipe
    suite: Suite
    out: Path
    device: str
    cadence: Cadence
    stop_at: int | None
    processes: int
    init: Path | None = None


def parse_arguments(suite: Suite, recipe: Recipe) -> Run:
    """Every field of the recipe is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint and log.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="on CPU; each takes an equal part of the shards")
    parser.add_argument("--init", type=Path, help="a stored parent whose weights a new run begins with")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, to see that everything runs")
    parser.add_argument("--stop-at", type=int, help="stop after this many steps; the same command without it continues")
    for item in fields(Recipe):
        default = getattr(recipe, item.name)
        name = "--" + item.name.replace("_", "-")
        if item.type is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default)
        else:
            parser.add_argument(name, type=item.type, default=default)
    arguments = parser.parse_args()
    chosen = Recipe(**{item.name: getattr(arguments, item.name) for item in fields(Recipe)})
    if chosen.shards % arguments.processes:
        parser.error(f"--processes {arguments.processes} does not divide --shards {chosen.shards}")
    cadence = Cadence()
    if arguments.smoke:
        chosen = replace(chosen, steps=6, tokens_per_step=2048 * chosen.shards)
        cadence = Cadence(log=1, probe=6, probe_count=4)
    return Run(
        chosen, suite, arguments.out, arguments.device, cadence, arguments.stop_at, arguments.processes, arguments.init
    )


def work(rank: int, run: Run) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    workers = connect(rank, run.processes, run.out / "processes")
    trainer = Trainer(run.recipe, run.suite, run.device, run.out, workers)
    if run.init and not (run.out / "checkpoint.pt").exists():
        trainer.begin_from(run.init)
    trainer.resume()
    train(trainer, run.cadence, run.stop_at)


def main(suite: Suite = SUITE, recipe: Recipe | None = None) -> None:
    """Train, or continue to."""
    run = parse_arguments(suite, recipe or Recipe())
    run.out.mkdir(parents=True, exist_ok=True)
    if run.processes == 1:
        work(0, run)
        return
    (run.out / "processes").unlink(missing_ok=True)
    spawn(work, (run,), nprocs=run.processes)


if __name__ == "__main__":
    main()
