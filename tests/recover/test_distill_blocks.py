"""distill_blocks on a tiny model: NeMo really trains, is really killed, and must equal a loop that knows no NeMo."""

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.data.batches import Batch, make_batches
from moesaic.data.calibration import read_conversations, tokenize
from moesaic.data.chat import load_tokenizer
from moesaic.models import layers, layout, loading
from moesaic.models.architecture import Block
from moesaic.models.checkpoint import Checkpoint, read_recovery
from moesaic.recover.distill_blocks import run as distill_blocks
from moesaic.recover.distill_blocks.loss import batch_order, block_loss
from moesaic.recover.distill_blocks.nemo import workers
from moesaic.recover.distill_blocks.stage import DistillBlocksConfig
from moesaic.recover.layerwise import split_held_out
from moesaic.search.prune_model import run as prune_model
from moesaic.search.prune_model.stage import PruneModelConfig

pytestmark = [
    pytest.mark.timeout(600),  # two processes import NeMo, which a busy machine takes minutes for
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

CONFIG = DistillBlocksConfig.model_validate(
    {
        "steps": 100,
        "batch_tokens": 300,
        "checkpoint_every_steps": 20,
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 5},
    }
)
UNMOVED = {f"model.layers.3.mlp.router.{part}" for part in ("weight", "bias")}
"""With one expert per token its weight is always 1, whatever the router says: no gradient."""


@dataclass(frozen=True)
class Run:
    """A finished stage, which was killed once on its way."""

    output: Path
    scratch: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def child(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layer 1 keeps half of its experts; layer 3 uses one expert per token and sees 4 tokens."""
    directory = tmp_path_factory.mktemp("child")
    parent = Checkpoint.open(tiny_parent).architecture
    found = parent.replace(1, Block(4, 2, 64)).replace(3, Block(8, 1, 64, 4))
    (directory / "ranking.json").write_text(json.dumps({"layers": [{"order": list(range(8))}] * 4}))
    candidates = {"puzzle": {"blocks": [block.as_config() for block in found.blocks]}}
    (directory / "architecture.json").write_text(json.dumps({"candidates": candidates}))
    prune_model.run(
        PruneModelConfig(),
        parent=tiny_parent,
        ranking=directory,
        architecture=directory,
        output=directory / "child",
        scratch=directory,
    )
    return directory / "child"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations of random words."""
    rng = random.Random(0)
    words = [f"w{index}" for index in range(40)]
    path = tmp_path_factory.mktemp("calibration") / "short.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            answer = " ".join(rng.choices(words, k=rng.randint(5, 20)))
            question = " ".join(rng.choices(words, k=10))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"effort": "low", "messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(child: Path, tiny_parent: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Kill the stage while its first block learns, then run it to the end."""
    directory = tmp_path_factory.mktemp("run")
    scratch, output = directory / "scratch", directory / "output"
    scratch.mkdir()
    inputs = [child, tiny_parent, calibration]
    stage = get_context("fork").Process(target=run_in_a_group, args=(CONFIG, *inputs, output, scratch))
    stage.start()
    group = stage.pid
    assert group is not None
    checkpoints = scratch / "layer-001" / "checkpoints"
    _wait_until(lambda: _has_finished(checkpoints) or not stage.is_alive())
    os.killpg(group, signal.SIGSTOP)  # or the worker might finish its block before it learns of the kill
    stage.kill()
    os.killpg(group, signal.SIGCONT)
    stage.join()
    assert stage.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    _wait_until(lambda: not _alive(group))  # the worker, which is in its process group, must not go on alone
    assert not (scratch / "layer-003" / "result.json").exists() and not output.exists()
    metrics = run(CONFIG, child, tiny_parent, calibration, output, scratch)
    return Run(output, scratch, metrics)


def run(
    config: DistillBlocksConfig, child: Path, parent: Path, calibration: Path, output: Path, scratch: Path
) -> dict[str, float]:
    return distill_blocks.run(
        config, child=child, parent=parent, calibration=calibration, output=output, scratch=scratch
    )


def run_in_a_group(*given: Any) -> None:
    """The stage as a process that leads a group."""
    os.setsid()
    torch.set_num_threads(1)  # a fork has none of this process's other threads
    run(*given)


def _wait_until(condition: Callable[[], bool], limit_s: float = 240) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def _has_finished(checkpoints: Path) -> bool:
    """Whether a checkpoint is whole: NeMo forgets one that a kill left with its mark, and starts over."""
    return any(checkpoints.glob("*-last.ckpt")) and not any(checkpoints.glob("*-unfinished"))


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def rows(run: Run, layer: int) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (run.output / "training.jsonl").read_text().splitlines()]
    return [row for row in found if row["layer"] == layer]


@pytest.mark.parametrize("layer", [1, 3])
def test_killed_and_resumed_it_equals_a_plain_loop(
    layer: int, finished: Run, child: Path, tiny_checkpoint: Checkpoint, calibration: Path
):
    expected, learned = train_plainly(Checkpoint.open(child), tiny_checkpoint, calibration, layer)
    # AdamW makes a step of a rounding error where a gradient is all but 0: after 100 steps errors are below 1e-5.
    assert [row["loss"] for row in rows(finished, layer) if "loss" in row] == pytest.approx(expected, rel=1e-4)
    before, written = Checkpoint.open(child), Checkpoint.open(finished.output)
    for name, tensor in learned.items():
        # A lost step of 100 would be 1 % of the change; one weight may be rounded to the next number of bfloat16.
        error = (written.tensor(name).float() - tensor.bfloat16().float()).norm()
        change = (tensor - before.tensor(name).float()).norm()
        assert bool(change > 0) == (name not in UNMOVED) and error <= 0.01 * change + 2**-8 * tensor.abs().max(), name


def train_plainly(
    child: Checkpoint, parent: Checkpoint, calibration: Path, layer: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without NeMo, states kept in memory."""
    tokenizer = load_tokenizer(parent.directory)
    sequences = [tokenize(tokenizer, row, 8192) for row in read_conversations(calibration)]
    batches = make_batches(split_held_out(sequences)[0], CONFIG.batch_tokens)
    rotary = loading.rotary(parent, 512)
    inputs = [parent_states(parent, batch, rotary, layer) for batch in batches]
    targets = [parent_states(parent, batch, rotary, layer + 1) for batch in batches]
    block = loading.load_block(child, layer)
    prefix = layout.layer_prefix(layer)
    names = layout.trainable_names(child.shape, child.architecture, CONFIG.trainable)
    learned = {name: block.get_parameter(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
    for parameter in learned.values():
        parameter.requires_grad = True
    settings = CONFIG.optimizer
    optimizer = torch.optim.AdamW(learned.values(), betas=settings.betas, eps=1e-12, weight_decay=0.0)
    losses = []
    for step, index in enumerate(batch_order(len(batches), CONFIG.seed, range(CONFIG.steps))):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * schedule(step)
        output = layers.run_block(block, inputs[index], rotary, child.architecture.blocks[layer].window)
        loss = block_loss(output, targets[index], batches[index].is_token)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), settings.max_gradient_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in learned.items()}


def parent_states(parent: Checkpoint, batch: Batch, rotary: layers.Rotary, boundary: int) -> torch.Tensor:
    (hidden,) = loading.embed(parent, [batch.token_ids])
    for layer in range(boundary):
        module = loading.load_block(parent, layer)
        hidden = layers.run_block(module, hidden, rotary, parent.architecture.blocks[layer].window)
    return hidden


def schedule(step: int) -> float:
    """Linear to 1 over the warm-up, then half a cosine down to the final ratio."""
    warmup, last = CONFIG.optimizer.warmup_steps, CONFIG.optimizer.final_learning_rate_ratio
    if step <= warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / (CONFIG.steps - warmup)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * done))


def test_it_went_on_where_it_was_killed(finished: Run):
    log = (finished.scratch / "worker-0.log").read_text()
    assert "Resuming training from checkpoint" in log
    for layer in (1, 3):
        steps = [row["step"] for row in rows(finished, layer) if "loss" in row]
        assert steps == list(range(1, CONFIG.steps + 1))


def test_held_out_loss_falls(finished: Run):
    for layer in (1, 3):
        before, after = (row["held_out_loss"] for row in rows(finished, layer) if "held_out_loss" in row)
        assert after < 0.9 * before
        assert finished.metrics[f"held_out_loss_before_layer_{layer:03d}"] == before
        assert finished.metrics[f"held_out_loss_after_layer_{layer:03d}"] == after
    assert finished.metrics["held_out_loss_after"] < finished.metrics["held_out_loss_before"]


def test_only_changed_blocks_change_and_experts_never(finished: Run, child: Path):
    before, after = Checkpoint.open(child), Checkpoint.open(finished.output)
    names = set(before.files)
    changed = {name for name in names if not torch.equal(before.tensor(name), after.tensor(name))}
    allowed = layout.trainable_names(before.shape, before.architecture, CONFIG.trainable)
    layers = ("model.layers.1.", "model.layers.3.")
    assert changed == {name for name in allowed if name.startswith(layers) and name not in UNMOVED}
    for file in {path.name for path in before.files.values()}:
        if "experts" in file or "outer" in file or "layer-000" in file:
            assert (child / file).read_bytes() == (finished.output / file).read_bytes()
    assert read_recovery(finished.output) == [{"stage": "distill_blocks", "steps": CONFIG.steps, "layers": [1, 3]}]


def test_finished_blocks_are_not_repeated(
    finished: Run, child: Path, tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(loading, "load_block", None)
    metrics = run(CONFIG, child, tiny_parent, calibration, tmp_path / "output", finished.scratch)
    assert metrics == finished.metrics
    for path in finished.output.iterdir():
        assert (tmp_path / "output" / path.name).read_bytes() == path.read_bytes()


def test_a_block_that_did_not_come_closer_stays_as_it_was(
    finished: Run, child: Path, tiny_parent: Path, calibration: Path, tmp_path: Path
):
    shutil.copytree(finished.scratch, tmp_path / "scratch")
    path = tmp_path / "scratch" / "layer-003" / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"held_out_after": result["held_out_before"]}))
    metrics = run(CONFIG, child, tiny_parent, calibration, tmp_path / "output", tmp_path / "scratch")
    assert (metrics["num_blocks"], metrics["num_blocks_better"]) == (2, 1)
    rest = "model-layer-{:03d}-rest.safetensors".format
    assert (tmp_path / "output" / rest(3)).read_bytes() == (child / rest(3)).read_bytes()
    assert (tmp_path / "output" / rest(1)).read_bytes() == (finished.output / rest(1)).read_bytes()
    assert read_recovery(tmp_path / "output")[-1]["layers"] == [1]


def test_without_steps_or_changes_the_weights_are_handed_on(
    child: Path, tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    for index, (config, model) in enumerate([(DistillBlocksConfig(), child), (CONFIG, tiny_parent)]):
        output = tmp_path / str(index)
        assert run(config, model, tiny_parent, calibration, output, tmp_path) == {
            "num_blocks": 0,
            "num_blocks_better": 0,
        }
        assert (output / "training.jsonl").read_text() == ""
        for path in Checkpoint.open(model).files.values():
            assert (output / path.name).read_bytes() == path.read_bytes()


def test_bad_input_is_refused_before_work(
    child: Path, tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = tmp_path / "one.jsonl"
    one.write_text(calibration.read_text().splitlines()[0] + "\n")
    with pytest.raises(ArtifactError, match="only 1 sequence"):
        run(CONFIG, child, tiny_parent, one, tmp_path / "output", tmp_path)
    outside = CONFIG.model_copy(update={"trainable": ("embedding", "head")})
    with pytest.raises(ConfigError, match="choose among attention, norms and router"):
        run(outside, child, tiny_parent, calibration, tmp_path / "output", tmp_path)
    with pytest.raises(ConfigError, match="cannot be cut out of"):
        run(CONFIG, tiny_parent, child, calibration, tmp_path / "output", tmp_path)
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"install moesaic\[nemo\]"):
        run(CONFIG, child, tiny_parent, calibration, tmp_path / "output", tmp_path)
    assert not (tmp_path / "output").exists()


def test_a_failing_worker_is_explained_and_ends_the_others(
    child: Path, tiny_parent: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\nread job\ncase "$job" in *layer-001*) echo boom >&2; exit 3;; esac\n'
        f"echo $$ > {tmp_path}/other; exec sleep 100\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    config = CONFIG.model_copy(update={"layers_in_parallel": 2})
    with pytest.raises(StageError, match=r"(?s)status 3.*worker-0\.log.*boom"):
        run(config, child, tiny_parent, calibration, tmp_path / "output", tmp_path)
    other = tmp_path / "other"
    assert not other.exists() or not Path(f"/proc/{other.read_text().strip()}").exists()
    assert not (tmp_path / "output").exists()


def test_each_worker_has_its_own_gpu_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    given = [workers.worker_environment({"CUDA_VISIBLE_DEVICES": "4,7"}, worker, 3) for worker in range(3)]
    assert [found["CUDA_VISIBLE_DEVICES"] for found in given] == ["4", "7", "4"]
    assert given[0]["OMP_NUM_THREADS"] == "2"
    assert workers.worker_environment({"OMP_NUM_THREADS": "1"}, 0, 3)["OMP_NUM_THREADS"] == "1"
    assert workers.worker_environment({"CUDA_VISIBLE_DEVICES": ""}, 0, 1)["CUDA_VISIBLE_DEVICES"] == ""
