"""Opening a checkpoint finds every kind of damage by its headers; writing one is all or nothing."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.core.errors import ArtifactError, StageError
from moesaic.models import checkpoint as checkpoint_module
from moesaic.models.checkpoint import CONFIG, INDEX, Checkpoint, read_recovery, rewrite_checkpoint, write_checkpoint
from tests.layer_states import layer_state


@pytest.fixture
def copy(tiny_parent: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_parent, tmp_path / "copy"))


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layers_are_what_transformers_reads(tiny_parent: Path, tiny_checkpoint: Checkpoint) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=torch.float32)
    for layer in range(tiny_checkpoint.num_layers):
        expected = model.model.layers[layer].state_dict()
        state = layer_state(tiny_checkpoint, layer)
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, expected[name]), name


def test_a_missing_model_says_what_a_model_is(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; a model is"):
        Checkpoint.open(tmp_path / "nowhere")


def test_another_model_family_is_named(copy: Path) -> None:
    _edit(copy / CONFIG, model_type="mixtral")
    with pytest.raises(ArtifactError, match=r"'mixtral'.*'gpt_oss'"):
        Checkpoint.open(copy)


def test_a_truncated_shard_is_named(copy: Path) -> None:
    shard = copy / "model-layer-002-experts.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=shard.name):
        Checkpoint.open(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model-layer-001-rest.safetensors").unlink()
    with pytest.raises(ArtifactError, match="model-layer-001-rest"):
        Checkpoint.open(copy)


def test_a_tensor_missing_from_index_and_shards_is_named(copy: Path) -> None:
    _edit(copy / CONFIG, num_hidden_layers=5, layer_types=["full_attention"] * 5)
    with pytest.raises(ArtifactError, match=r"model\.layers\.4"):
        Checkpoint.open(copy)


@pytest.mark.parametrize("place", ["../other/{name}", "{directory}/{name}"])
def test_an_index_cannot_name_files_elsewhere(copy: Path, tmp_path: Path, place: str) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    weights = json.loads((copy / INDEX).read_text())["weight_map"]
    moved = {name: place.format(name=file, directory=other) for name, file in weights.items()}
    _edit(copy / INDEX, weight_map=moved)
    with pytest.raises(ArtifactError, match="which is outside of the model's directory"):
        Checkpoint.open(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    _edit(copy / CONFIG, num_local_experts=7)
    with pytest.raises(ArtifactError, match=r"has shape \(8,.*asks for \(7,"):
        Checkpoint.open(copy)


def test_fewer_experts_than_a_token_uses_is_refused(copy: Path) -> None:
    _edit(copy / CONFIG, num_local_experts=1)
    with pytest.raises(ArtifactError, match=r"layer 0: .* 1 experts cannot use 2"):
        Checkpoint.open(copy)


def test_pickles_are_never_read(copy: Path) -> None:
    for shard in [*copy.glob("*.safetensors"), copy / INDEX]:
        shard.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin is a pickle"):
        Checkpoint.open(copy)


def _one_shard() -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "model-0", {"a": torch.ones(2)}


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", no_space)
    with pytest.raises(StageError, match="is full"):
        write_checkpoint(tmp_path / "model", {}, _one_shard())
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from _one_shard()
        raise RuntimeError("the second shard cannot be made")

    with pytest.raises(RuntimeError):
        write_checkpoint(tmp_path / "model", {}, shards())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_overwritten(copy: Path) -> None:
    with pytest.raises(ArtifactError, match="is not empty"):
        write_checkpoint(copy, {}, _one_shard())


def test_rewriting_replaces_named_tensors_and_leaves_other_shards_as_they_were(copy: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(copy)
    name = "model.layers.1.self_attn.sinks"
    step = {"stage": "distill", "steps": 3}
    rewrite_checkpoint(source, tmp_path / "new", {name: torch.full((4,), 0.5)}, step)
    new = Checkpoint.open(tmp_path / "new")
    assert new.tensor(name).tolist() == [0.5] * 4 and new.tensor(name).dtype == source.tensor(name).dtype
    changed = {path.name for path in set(new.files.values()) if path.read_bytes() != (copy / path.name).read_bytes()}
    assert changed == {"model-layer-001-rest.safetensors"}
    for other in new.files.keys() - {name}:
        assert torch.equal(new.tensor(other), source.tensor(other)), other
    assert json.loads((new.directory / INDEX).read_text()) == json.loads((copy / INDEX).read_text())
    assert (new.directory / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert read_recovery(new.directory) == [step]


def test_rewriting_appends_to_what_was_done_before_and_can_add_a_shard(copy: Path, tmp_path: Path) -> None:
    (copy / "notes.json").write_text("{}")
    first, second = {"stage": "first"}, {"stage": "second"}
    for place, before, step, scale in (("one", copy, first, 1.0), ("two", tmp_path / "one", second, 2.0)):
        added = {"model.layers.0.self_attn.k_scale": torch.tensor(scale)}
        rewrite_checkpoint(Checkpoint.open(before), tmp_path / place, {}, step, added, "model-kv-scales")
    new = Checkpoint.open(tmp_path / "two")
    assert read_recovery(new.directory) == [first, second]
    assert new.tensor("model.layers.0.self_attn.k_scale").item() == 2.0
    assert (new.directory / "notes.json").is_file()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.9.self_attn.sinks", (4,), "no tensor model.layers.9"),
        ("model.layers.0.mlp.experts.down_proj_bias", (8, 64), "belongs to the experts"),
        ("model.norm.weight", (65,), r"shape \(65,\)"),
    ],
)
def test_rewriting_refuses_what_recovery_may_not_touch(
    copy: Path, tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        rewrite_checkpoint(Checkpoint.open(copy), tmp_path / "new", {name: torch.zeros(shape)}, {})
    assert not (tmp_path / "new").exists()
