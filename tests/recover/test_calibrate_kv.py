"""Calibration of a child whose layers differ, by the real engine: amax by hand, and planted outliers that need scales.

Keys of one layer are 1024 times larger and its queries smaller, so that the function stays the same: BF16 does not
notice, FP8 without scales saturates.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.calibration import load_batches
from moesaic.measure.evaluate import run as evaluate
from moesaic.measure.evaluate.stage import EvaluateConfig
from moesaic.models import kv_cache, layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, read_recovery, rewrite_checkpoint, write_checkpoint
from moesaic.models.kv_cache import KvScales
from moesaic.models.whole_model import load_model
from moesaic.recover.calibrate_kv import modelopt as modelopt_kv
from moesaic.recover.calibrate_kv import run as calibrate_kv
from moesaic.recover.calibrate_kv.stage import CalibrateKvConfig
from moesaic.search.prune_model.pruning import prune_layer
from tests.closeness import ROUNDING

BLOCKS = Architecture.of([Block(4, 2, 64, 8), Block(8, 2, 64), Block(2, 2, 64, 8), Block(6, 2, 64, 5)])
OUTLIERS = 1
"""The layer whose keys are large."""
CONFIG = CalibrateKvConfig(max_sequences=7, max_tokens=40, batch_tokens=100, precision="float32")


@dataclass(frozen=True)
class Run:
    """A model, the calibration set, and what the stage made of them."""

    model: Path
    calibration: Path
    output: Path
    scratch: Path
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def run(tiny_parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The engine's process is started here, once."""
    directory = tmp_path_factory.mktemp("calibrated")
    model, calibration, output, scratch = (directory / name for name in ("model", "rows", "output", "scratch"))
    for path in (calibration, output, scratch):
        path.mkdir()
    _write_child(tiny_parent, directory / "child")
    _plant(directory / "child", model)
    (calibration / "rows.jsonl").write_text("".join(_row(index) for index in range(7)))
    metrics = calibrate_kv.run(CONFIG, model=model, calibration=calibration, output=output, scratch=scratch)
    return Run(model, calibration, output, scratch, metrics)


def _write_child(tiny_parent: Path, child: Path) -> None:
    parent = Checkpoint.open(tiny_parent)

    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "model-outer", {name: parent.tensor(name) for name in layout.outer_specs(parent.shape)}
        for layer, block in enumerate(BLOCKS.blocks):
            tensors = {name: parent.tensor(name) for name in parent.layer_names(layer)}
            yield from layer_shards(layer, prune_layer(tensors, range(block.num_experts)))

    write_checkpoint(child, layout.child_config(parent.config, BLOCKS), shards(), tiny_parent.glob("tokenizer*"))
    (child / "chat_template.jinja").write_text((tiny_parent / "chat_template.jinja").read_text())


def _plant(child: Path, model: Path) -> None:
    """Fold scales the wrong way round: keys grow by 1024, values by 256."""
    source = Checkpoint.open(child)
    names = [name for name in source.layer_names(OUTLIERS) if ".self_attn." in name]
    tensors = {name: source.tensor(name) for name in names}
    rewrite_checkpoint(source, model, kv_cache.fold(tensors, OUTLIERS, KvScales(2**-10, 2**-8)), {"stage": "planted"})


def _row(index: int) -> str:
    words = " ".join(f"w{(7 * index + 3 * place) % 44}" for place in range(4 + 3 * index))
    messages = [{"role": "user", "content": words}, {"role": "assistant", "thinking": "w5 w6", "content": f"w{index}"}]
    return json.dumps({"messages": messages, "effort": "low"}) + "\n"


def amax_by_hand(run: Run) -> list[tuple[float, float]]:
    """Every sequence alone, so without padding, through the whole model; K and V are read out of its cache."""
    batches = load_batches(run.calibration, run.model, max_sequences=7, max_tokens=40, batch_tokens=100)
    assert any(not batch.is_token.all() for batch in batches)
    model = load_model(run.model)
    largest = torch.zeros(4, 2)
    handles = kv_cache.emulate(model, [_watch(largest, layer) for layer in range(4)])
    with torch.inference_mode():
        for batch in batches:
            for tokens, is_token in zip(batch.token_ids, batch.is_token, strict=True):
                model(tokens[is_token].unsqueeze(0), use_cache=True)
    for handle in handles:
        handle.remove()
    return [(float(key), float(value)) for key, value in largest]


def _watch(largest: Tensor, layer: int) -> tuple[kv_cache.Rounding, kv_cache.Rounding]:
    def watch(which: int) -> kv_cache.Rounding:
        def look(states: Tensor) -> Tensor:
            largest[layer, which] = torch.maximum(largest[layer, which], states.abs().max())
            return states

        return look

    return watch(0), watch(1)


def test_amax_is_that_of_the_whole_model_on_real_tokens(run: Run) -> None:
    found, expected = json.loads((run.scratch / "amax.json").read_text()), amax_by_hand(run)
    for layer, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, rel=ROUNDING), f"layer {layer}"
    assert expected[OUTLIERS][0] > 10 * 448 > max(key for layer, (key, _) in enumerate(expected) if layer != OUTLIERS)
    assert run.metrics["largest_key"] == pytest.approx(expected[OUTLIERS][0], rel=ROUNDING)
    scales = kv_cache.read_scales(Checkpoint.open(run.output))
    values = [kv_cache.next_bfloat16(value / 448) for _, value in expected]
    assert [scale.value for scale in scales] == pytest.approx(values, rel=2**-7)
    for scale, (_, value) in zip(scales, expected, strict=True):
        assert float(torch.tensor(scale.value).bfloat16()) == scale.value >= value / 448 * (1 - ROUNDING)


def test_the_weights_stay_and_the_scales_are_one_small_file(run: Run) -> None:
    for shard in run.model.glob("*.safetensors"):
        assert shard.read_bytes() == (run.output / shard.name).read_bytes()
    assert (run.output / "model-kv-scales.safetensors").stat().st_size < 2000
    assert read_recovery(run.output)[-1] == {"stage": "calibrate_kv", "power_of_two": False, "folded": False}
    tokens = torch.arange(6, 40).unsqueeze(0)
    assert torch.equal(load_model(run.output)(tokens).logits, load_model(run.model)(tokens).logits)


def again(run: Run, output: Path, config: CalibrateKvConfig) -> Path:
    """The stage once more on the amax in the scratch directory, so without the engine's process."""
    output.mkdir()
    calibrate_kv.run(config, model=run.model, calibration=run.calibration, output=output, scratch=run.scratch)
    return output


@torch.inference_mode()
def test_folded_weights_at_unit_scale_are_the_scaled_cache_bit_for_bit(run: Run, tmp_path: Path) -> None:
    rounded = again(run, tmp_path / "a", CONFIG.model_copy(update={"power_of_two": True}))
    folded = again(run, tmp_path / "b", CONFIG.model_copy(update={"power_of_two": True, "fold": True}))
    scales = kv_cache.read_scales(Checkpoint.open(rounded))
    assert all(kv_cache.next_power_of_two(value) == value for scale in scales for value in (scale.key, scale.value))
    assert kv_cache.read_scales(Checkpoint.open(folded)) == [kv_cache.UNIT] * 4
    tokens = torch.arange(6, 40).unsqueeze(0)
    models = load_model(rounded), load_model(folded)
    assert torch.equal(models[0](tokens, use_cache=False).logits, models[1](tokens, use_cache=False).logits)
    kv_cache.emulate(models[0], kv_cache.roundings("fp8", scales))
    kv_cache.emulate(models[1], kv_cache.roundings("fp8_unit", scales))
    assert torch.equal(models[0](tokens, use_cache=True).logits, models[1](tokens, use_cache=True).logits)


@torch.inference_mode()
def test_with_outliers_calibrated_scales_win(run: Run) -> None:
    """Unit scale saturates the planted layer; calibrated FP8 keeps the logits and most greedy tokens."""
    scales = kv_cache.read_scales(Checkpoint.open(run.output))
    tokens = torch.randint(6, 64, (8, 40), generator=torch.Generator().manual_seed(0))
    model = load_model(run.output)
    exact = model(tokens, use_cache=True).logits
    errors, agreements = {}, {}
    for kind in ("bf16", "fp8", "fp8_unit"):
        handles = kv_cache.emulate(model, kv_cache.roundings(kind, scales))
        logits = model(tokens, use_cache=True).logits
        errors[kind] = float((logits - exact).square().mean() / exact.square().mean())
        agreements[kind] = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
        for handle in handles:
            handle.remove()
    assert errors["bf16"] < errors["fp8"] < errors["fp8_unit"] / 5
    assert agreements["bf16"] > agreements["fp8"] > agreements["fp8_unit"] + 0.2, agreements


def test_evaluation_takes_the_scales_of_the_checkpoint(run: Run, tmp_path: Path) -> None:
    problem = {"id": "a", "task": "t", "prompt": [{"role": "user", "content": "w1 w2"}], "answer": "w1"}
    (tmp_path / "tests.jsonl").write_text(json.dumps(problem | {"verifier": "exact_match"}) + "\n")
    (tmp_path / "output").mkdir()
    (tmp_path / "scratch").mkdir()
    inputs = {name: tmp_path / name for name in ("output", "scratch")} | {"tests": tmp_path / "tests.jsonl"}
    config = EvaluateConfig(efforts=("low",), max_new_tokens=4, kv_cache="fp8")
    evaluate.run(config, model=run.output, **inputs)
    evaluation = json.loads((tmp_path / "output/evaluation.json").read_text())
    assert evaluation["kv_cache"] == "fp8"
    assert [step["stage"] for step in evaluation["steps"]] == ["planted", "calibrate_kv"]


def test_bad_inputs_are_refused_before_the_engine_starts(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"output": tmp_path / "output", "scratch": tmp_path}
    with pytest.raises(ArtifactError, match="no such file or directory"):
        calibrate_kv.run(CONFIG, model=run.model, calibration=tmp_path / "absent.jsonl", **paths)
    monkeypatch.setattr(modelopt_kv.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="nvidia-modelopt, which is not installed"):
        calibrate_kv.run(CONFIG, model=run.model, calibration=run.calibration, **paths)
    assert not list(tmp_path.iterdir())
