"""Synthetic checkpoints: the original's layout, valid bytes, and little memory to write them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.command_line.main import main
from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.models import layout, mxfp4, synthesis
from moesaic.models.checkpoint import INDEX, Checkpoint
from moesaic.models.families.family import TensorSpec
from moesaic.models.synthesis import MODELS, model_config, plan_shards, scale_model, write_synthetic
from moesaic.models.whole_model import load_model

LIKE = MODELS["gpt-oss-120b"]
TINY = scale_model(LIKE, 1 / 45, num_layers=4, num_experts=8, num_shards=5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("synthetic") / "tiny"
    write_synthetic(TINY, directory)
    return directory


def test_full_size_is_the_original() -> None:
    """116.83B parameters in 60.8 GiB; 64 GB of uploads in 15 shards of about 4.3 GB."""
    whole = scale_model(LIKE)
    assert whole == LIKE
    assert whole.num_bytes / 2**30 == pytest.approx(60.77, abs=0.01)
    sizes = [sum(spec.num_bytes for spec in shard.values()) for shard in plan_shards(whole)]
    assert len(sizes) == 15
    assert max(sizes) < 5.5e9
    assert sum(sizes) == whole.num_bytes


def test_config_reads_back_as_the_same_model() -> None:
    for model in (*MODELS.values(), TINY):
        assert layout.read_config(model_config(model)) == (model.shape, model.architecture)


def test_scale_keeps_shapes_valid() -> None:
    for scale in (1, 0.5, 0.25, 0.1, 1 / 45, 0.001):
        model = scale_model(LIKE, scale)
        shape, widths = model.shape, [block.expert_width % 32 for block in model.architecture.blocks]
        assert shape.hidden_size % 32 == max(widths) == shape.vocab_size % 64 == 0
        assert shape.num_heads == 8 * shape.num_kv_heads
        assert shape.head_dim == 64
    half = scale_model(LIKE, 0.5)
    assert (half.shape.hidden_size, half.shape.num_heads, half.shape.vocab_size) == (1440, 32, 100_544)
    assert 0.24 < half.num_bytes / LIKE.num_bytes < 0.27


def test_it_is_a_checkpoint_whose_pairs_straddle_shards(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    assert checkpoint.packed
    assert (checkpoint.shape, checkpoint.architecture) == (TINY.shape, TINY.architecture)
    index = json.loads((tiny / INDEX).read_text())
    assert index["metadata"]["total_size"] == TINY.num_bytes
    assert len(set(index["weight_map"].values())) == len(list(tiny.glob("*.safetensors"))) > 1
    blocks = [name for name in checkpoint.files if name.endswith("_blocks")]
    apart = [name for name in blocks if checkpoint.files[name] != checkpoint.files[name.replace("_blocks", "_scales")]]
    assert len(apart) == len(plan_shards(TINY)) - 1


def test_transformers_loads_it_and_its_logits_are_finite_and_alive(tiny: Path) -> None:
    model = load_model(tiny, torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(12).unsqueeze(0)).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10


def test_packed_weights_are_of_the_size_of_their_inputs(tiny: Path) -> None:
    """Rows of 64 inputs: a deviation of 1/8, to a power of two."""
    checkpoint = Checkpoint.open(tiny)
    prefix = "model.layers.0.mlp.experts.down_proj"
    rows = mxfp4.dequantize(checkpoint.tensor(f"{prefix}_blocks"), checkpoint.tensor(f"{prefix}_scales"))
    assert 1 / 16 < rows.std() < 1 / 4
    assert abs(rows.mean()) < 0.01


def test_bytes_depend_on_seed_and_name_alone(tiny: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    write_synthetic(scale_model(LIKE, 1 / 45, num_layers=4, num_experts=8, num_shards=2), again)
    write_synthetic(TINY, other, seed=1)
    name = "model.layers.3.mlp.experts.gate_up_proj_blocks"
    first, same, different = (Checkpoint.open(path).tensor(name) for path in (tiny, again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, different)


def test_pieces_join_to_what_one_draw_gives() -> None:
    spec = TensorSpec("BF16", (5, 7), 35)
    values = torch.frombuffer(bytearray(b"".join(synthesis.random_bytes("x.bias", spec, 0))), dtype=torch.bfloat16)
    assert len(values) == 35
    assert values.isfinite().all()
    assert 0.005 < values.float().std() < 0.04


def test_rounding_to_bfloat16_is_torchs() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    ours = torch.frombuffer(bytearray(synthesis._bfloat16(values.numpy())), dtype=torch.bfloat16)
    assert torch.equal(ours, values.bfloat16())


def test_nothing_is_left_of_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "write_index", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(StageError, match="full"):
        write_synthetic(scale_model(LIKE, 0.01, 1, 4), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_found_before_writing(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="choose a smaller scale"):
        synthesis._check_room(tmp_path / "model", 10**18)


def test_what_exists_is_not_overwritten(tiny: Path) -> None:
    with pytest.raises(ArtifactError, match="not empty"):
        write_synthetic(TINY, tiny)


@pytest.mark.parametrize(("scale", "layers"), [(0, None), (1.5, None), (0.5, 0)])
def test_values_out_of_range_are_refused(scale: float, layers: int | None) -> None:
    with pytest.raises(ConfigError):
        scale_model(LIKE, scale, layers)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--like", "gpt-oss-20b", "--scale", "0.02", "--layers", "2", "--experts", "4"]
    assert main(["synth", *size, str(tmp_path / "model")]) == 0
    assert Checkpoint.open(tmp_path / "model").num_layers == 2
    assert main(["synth", "--like", "gpt-oss-120b", "--dry-run", str(tmp_path / "other")]) == 0
    assert "60.8 GiB" in capsys.readouterr().out
    assert not (tmp_path / "other").exists()
    assert main(["synth", "--like", "gpt-4", str(tmp_path / "other")]) == 2


_PEAK = """
import resource, sys
from pathlib import Path
from moesaic.models.synthesis import MODELS, scale_model, write_synthetic
model = scale_model(MODELS["gpt-oss-120b"], 0.1, num_layers=int(sys.argv[1]), num_experts=32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_synthetic(model, Path(sys.argv[2]))
print(model.num_bytes / 2**20, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    run = [sys.executable, "-c", _PEAK, "24", str(tmp_path / "model")]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    model_mib, grown_mib = (float(word) for word in done.stdout.split())
    assert model_mib > 100
    assert grown_mib < 100, "a piece of 4 million values is 16 MiB in float32, a few copies of it are all there is"
