"""Layers read ahead are the layers; states spill without a changed bit; memory does not grow with the layers."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moesaic.core.errors import ConfigError
from moesaic.models import layout, loading
from moesaic.models.architecture import Architecture
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.streaming import LayerReader, StateOffloader, state_memory_bytes
from moesaic.models.synthesis import MODELS, Model, scale_model, write_synthetic
from tests.layer_states import layer_state

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

MEASURE = """
import json, os, sys
from pathlib import Path
from moesaic.search.rank_experts.stage import RankExpertsConfig
from moesaic.search.score_blocks.stage import ScoreBlocksConfig
from moesaic.platform.runs.records import peak_memory_mib
from moesaic.search.rank_experts import run as rank_experts
from moesaic.search.score_blocks import run as score_blocks

def peak(action):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory_mib()
    action()
    return peak_memory_mib() - before

place, data = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for name in ("warm", "2", "4"):
    parent, ranking, scores, scratch = (place / f"{kind}-{name}" for kind in ("parent", "ranking", "scores", "scratch"))
    for directory in (ranking, scores, scratch):
        directory.mkdir()
    sets = {"calibration_short": data, "calibration_long": data}
    score = ScoreBlocksConfig.model_validate({"space": {"expert_counts": [4]}, "variants_per_batch": 2})
    found[name] = {
        "rank": peak(lambda: rank_experts.run(
            RankExpertsConfig(), parent=parent, calibration_short=data, output=ranking, scratch=scratch)),
        "score": peak(lambda: score_blocks.run(
            score, parent=parent, ranking=ranking, **sets, output=scores, scratch=scratch)),
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_layers_read_ahead_are_the_layers(tiny_checkpoint: Checkpoint, device: str):
    """In order, out of order, and without being told what comes next; on a GPU through both pinned buffers."""
    reader = LayerReader(tiny_checkpoint, torch.float32, torch.device(device))
    for layer, then in ((0, 1), (1, 3), (2, None), (3, 3), (3, 0)):
        found = reader.load(layer, then).state_dict()
        expected = loading.load_block(tiny_checkpoint, layer).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)
        assert {tensor.device.type for tensor in found.values()} == {device}
    reader.close()


def test_layers_equal_the_checkpoints_own_reading(tiny_checkpoint: Checkpoint):
    """``layer_state`` unpacks in one go and copies: the slow and plain way."""
    for dtype in (torch.float32, torch.bfloat16):
        found = loading.load_block(tiny_checkpoint, 1, dtype).state_dict()
        for name, expected in layer_state(tiny_checkpoint, 1, dtype).items():
            torch.testing.assert_close(found[name].to(dtype), expected, rtol=0, atol=0)


def test_states_spill_when_the_host_memory_is_full_and_free_it(tmp_path: Path):
    """Memory for two tensors of 40 bytes: the third goes to disk, and after a drop the next one does not."""
    offloader = StateOffloader(80, tmp_path, CPU)
    tensors = [torch.arange(10.0), torch.randn(2, 5), torch.randn(5, 2)]
    offloaded = [offloader.offload(tensor) for tensor in tensors]
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [40]
    assert all(torch.equal(kept.read(), tensor) for kept, tensor in zip(offloaded, tensors, strict=True))
    offloaded[0].drop()
    offloader.offload(tensors[0])
    assert len(list(tmp_path.iterdir())) == 1
    offloaded[2].drop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", DEVICES)
def test_states_keep_their_bits_wherever_they_are(device: str, tmp_path: Path):
    """On the device while there is room, then in the host's memory, then in a file."""
    state = torch.randn(3, 4, 5, device=device).bfloat16()
    offloader = StateOffloader(2 * state.nbytes, tmp_path, torch.device(device))
    offloader.device_bytes = min(offloader.device_bytes, state.nbytes)
    offloaded = [offloader.offload(state) for _ in range(4)]
    contents = [each.read() for each in offloaded]
    assert len(list(tmp_path.iterdir())) == (1 if device == "cuda" else 2)
    assert all(torch.equal(content.to(device), state) for content in contents)
    for tensor in offloaded:
        tensor.drop()
    assert (offloader.host_bytes, list(tmp_path.iterdir())) == (2 * state.nbytes, [])


def test_spilled_states_keep_dtype_and_bits_and_killed_runs_leave_none(tmp_path: Path):
    offloader = StateOffloader(0, tmp_path, CPU)
    half = torch.randn(3, 4, 5).bfloat16()
    assert torch.equal(offloader.offload(half).read(), half)
    assert offloader.offload(half).read().dtype == torch.bfloat16
    assert len(list(tmp_path.iterdir())) == 2
    StateOffloader(0, tmp_path, CPU)
    assert not list(tmp_path.iterdir())


def test_the_budget_is_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "10")
    assert state_memory_bytes(2) == 5 * 2**20
    monkeypatch.delenv("MOESAIC_STATE_MEMORY_MIB")
    assert 0 < state_memory_bytes(2) == pytest.approx(state_memory_bytes(1) / 2, rel=0.2)
    monkeypatch.setenv("MOESAIC_STATE_MEMORY_MIB", "some")
    with pytest.raises(ConfigError, match="is 'some'; set it to a number of MiB"):
        state_memory_bytes(1)


def test_memory_is_two_layers_whatever_their_number(tiny_parent: Path, tmp_path: Path):
    """Ranking and scoring of 2 and 4 layers of 48 MiB each, in one process of its own, by peak resident memory."""
    like = scale_model(MODELS["gpt-oss-20b"], scale=0.25, num_experts=8)
    shape, block = replace(like.shape, vocab_size=64), like.architecture.blocks[1]
    layer_mib = 4 * sum(spec.num_parameters for spec in layout.layer_specs(shape, 0, block).values()) / 2**20
    assert 40 < layer_mib < 60
    for name, num_layers in (("warm", 1), ("2", 2), ("4", 4)):
        parent = tmp_path / f"parent-{name}"
        write_synthetic(Model(shape, Architecture.of([block] * num_layers), 2), parent)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_parent / file, parent)
    data = tmp_path / "set.jsonl"
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5 w6"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(data)]
    gives_back = {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
    }  # freed memory leaves the process at once
    result = subprocess.run(command, env=os.environ | gives_back, capture_output=True, text=True, check=True)
    peaks_mib = json.loads(result.stdout.splitlines()[-1])
    for stage in ("rank", "score"):
        assert peaks_mib["4"][stage] < 2 * layer_mib, (layer_mib, peaks_mib)
        assert peaks_mib["4"][stage] < peaks_mib["2"][stage] + layer_mib / 4, (layer_mib, peaks_mib)
