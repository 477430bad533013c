"""What a checkpoint is, is decided when it is opened: it is read as what it is, by every reader, or it is refused."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moesaic.core.errors import ArtifactError, MoesaicError
from moesaic.models import layout, mxfp4
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, rewrite_checkpoint
from moesaic.models.checkpoint_layout import INDEX
from moesaic.models.families.family import ModelShape
from moesaic.models.families.gpt_oss import GPT_OSS, PACKED_PROJECTIONS
from moesaic.models.loading import check_weights
from moesaic.models.whole_model import load_model
from tests.tiny_models import parent_config

SHAPE = ModelShape(GPT_OSS, 32, 2, 1, 16, 32, 256)
BLOCKS = Architecture.of([Block(2, 1, 32, 8), Block(2, 1, 32)])
CONFIG = parent_config() | {
    "num_hidden_layers": 2,
    "num_local_experts": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 256,
    "layer_types": ["sliding_attention", "full_attention"],
}
SCALE = "model.layers.1.mlp.experts.down_proj_scales"
BIAS = "model.layers.1.mlp.router.bias"


def plain_tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    specs = layout.tensor_specs(SHAPE, BLOCKS, packed=False)
    return {name: (torch.randn(spec.shape, generator=draw) / 4).bfloat16() for name, spec in specs.items()}


def packed_tensors() -> dict[str, Tensor]:
    found = {}
    for name, tensor in plain_tensors().items():
        if name.endswith(PACKED_PROJECTIONS):
            found[f"{name}_blocks"], found[f"{name}_scales"] = mxfp4.quantize(tensor.transpose(-1, -2))
        else:
            found[name] = tensor
    return found


TENSORS = packed_tensors()


@dataclass
class Folder:
    """A checkpoint that is about to be written: which tensors lie in which file, the index, the config, other files."""

    shards: dict[str, dict[str, Tensor]] = field(default_factory=lambda: {"model.safetensors": dict(TENSORS)})
    index: dict[str, str] | None = None
    config: dict[str, object] = field(default_factory=lambda: dict(CONFIG))
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def all_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}

    def only(self) -> dict[str, Tensor]:
        (shard,) = self.shards.values()
        return shard

    def split(self, *names: str) -> None:
        """Deal the tensors out to files of these names, and list them."""
        tensors = self.all_tensors
        self.shards = {name: {} for name in names}
        for number, (name, tensor) in enumerate(tensors.items()):
            self.shards[names[number % len(names)]][name] = tensor
        self.list()

    def list(self) -> None:
        self.index = {name: file for file, shard in self.shards.items() for name in shard}

    def write(self, directory: Path) -> Path:
        directory.mkdir()
        for file, tensors in self.shards.items():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            save_file({n: t.contiguous() for n, t in tensors.items()}, directory / file, {"format": "pt"})
        if self.index is not None:
            (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))
        (directory / "config.json").write_text(json.dumps(self.config))
        for file, content in self.files.items():
            (directory / file).parent.mkdir(parents=True, exist_ok=True)
            (directory / file).write_bytes(content)
        return directory


@cache
def reference() -> dict[str, Tensor]:
    """The model's weights as transformers' own loader reads the plain layout."""
    with TemporaryDirectory() as place:
        directory = Folder().write(Path(place) / "model")
        return dict(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict())


def assert_is_the_reference(directory: Path) -> None:
    """Both readers find the weights of the reference, and so does the one that reads a rewritten copy."""
    with suppress(FileNotFoundError):
        shutil.rmtree(directory.with_name("copy"))
    rewrite_checkpoint(Checkpoint.open(directory), directory.with_name("copy"), {}, {"stage": "test"})
    for place in (directory, directory.with_name("copy")):
        state = load_model(place).state_dict()
        assert state.keys() == reference().keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, reference()[name].float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_models_are_those_of_transformers(tiny_parent: Path, dtype: torch.dtype) -> None:
    own, theirs = load_model(tiny_parent, dtype), AutoModelForCausalLM.from_pretrained(tiny_parent, dtype=dtype)
    expected = theirs.state_dict()
    assert own.state_dict().keys() == expected.keys()
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        experts = ".mlp.experts." in name  # which transformers unpacks to bfloat16, whatever it is asked for
        assert experts or tensor.dtype == expected[name].dtype, name
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in own.parameters())
    for name, buffer in theirs.named_buffers():
        assert torch.equal(own.get_buffer(name), buffer), name
    assert (
        own.generation_config.to_diff_dict() | {"_from_model_config": True} == theirs.generation_config.to_diff_dict()
    )
    assert not own.training and own.config.name_or_path == str(tiny_parent)


def _exponents(folder: Folder) -> None:
    for shard in folder.shards.values():
        for name in [name for name in shard if name.endswith("_scales")]:
            shard[name] = shard[name].view(torch.float8_e8m0fnu)


def _unused(folder: Folder) -> None:
    folder.only()["model.rotary_emb.inv_freq"] = torch.ones(8)
    folder.only()["model.position_ids"] = torch.arange(4)


def _unpack(folder: Folder) -> None:
    shard = folder.only()
    for name in [name for name in shard if name.endswith("_blocks")]:
        base = name.removesuffix("_blocks")
        rows = mxfp4.dequantize(shard.pop(name), shard.pop(f"{base}_scales").view(torch.uint8), torch.bfloat16)
        shard[base] = rows.transpose(-1, -2)
    del folder.config["quantization_config"]


def _in_other_floats(folder: Folder) -> None:
    _unpack(folder)
    for name, tensor in [pair for pair in folder.only().items() if pair[1].is_floating_point()]:
        folder.only()[name] = tensor.float() if "experts" in name else tensor.double()


def _rename(folder: Folder) -> None:
    folder.shards = {"gpt-oss.final(1).safetensors": folder.only()}


def _two_without_index(folder: Folder) -> None:
    folder.split("a.safetensors", "b.safetensors")
    folder.index = None


LAYOUTS: dict[str, Callable[[Folder], object]] = {
    "one file": lambda folder: None,
    "one file, listed": Folder.list,
    "one oddly named file": _rename,
    "shards": lambda folder: folder.split("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "shards without an index": _two_without_index,
    "shards in sub-folders": lambda folder: folder.split("a/model.safetensors", "b/model.safetensors"),
    "scales as F8_E8M0": _exponents,
    "tensors nothing uses": _unused,
    "unpacked": _unpack,
    "unpacked, wider floats": _in_other_floats,
    "null quantization": lambda folder: (_unpack(folder), folder.config.update(quantization_config=None)),
    "original/ and metal/": lambda folder: folder.files.update(
        {"original/model.safetensors": b"x" * 99, "metal/model.bin": b"y" * 99}
    ),
    "notes of a Mac's file system": lambda folder: folder.files.update(
        {"._model.safetensors": b"\0\5\x16\7", "._a.bin": b""}
    ),
    "pickles beside": lambda folder: folder.files.update({"training_args.bin": b"\x80\x04."}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_meaning_are_read(tmp_path: Path, layout: str) -> None:
    folder = Folder()
    LAYOUTS[layout](folder)
    assert_is_the_reference(folder.write(tmp_path / "model"))


def test_its_parts_are_what_it_is_made_of(tmp_path: Path) -> None:
    folder = Folder(files={"original/model.safetensors": b"x", "metal/model.bin": b"y", "old.safetensors": b"z"})
    folder.files |= {"tokenizer.json": b"{}", "LICENSE": b"", ".gitattributes": b"", "optimizer.pt": b"", "a.gguf": b""}
    folder.split("a/model-1.safetensors", "model-2.safetensors")
    directory = folder.write(tmp_path / "model")
    parts = {path.relative_to(directory).as_posix() for path in Checkpoint.open(directory).parts}
    assert parts == {
        "a/model-1.safetensors", "model-2.safetensors", INDEX, "config.json", "tokenizer.json", "LICENSE"
    }  # fmt: skip


def _duplicate(folder: Folder) -> None:
    folder.split("a.safetensors", "b.safetensors")
    folder.shards["a.safetensors"] |= folder.shards["b.safetensors"]


def _listed_elsewhere(folder: Folder) -> None:
    folder.split("a.safetensors", "b.safetensors")
    assert folder.index is not None
    name = next(iter(folder.shards["a.safetensors"]))
    folder.index[name] = "b.safetensors"


def _both(folder: Folder) -> None:
    folder.split("a.safetensors", "b.safetensors")
    folder.shards["model.safetensors"] = dict(TENSORS)


def _mixed(folder: Folder) -> None:
    blocks, scales = (folder.only()[SCALE.replace("scales", kind)].view(torch.uint8) for kind in ("blocks", "scales"))
    rows = mxfp4.dequantize(blocks, scales, torch.bfloat16)
    folder.only()[SCALE.removesuffix("_scales")] = rows.transpose(-1, -2)


CONTRADICTIONS: dict[str, tuple[Callable[[Folder], object], str]] = {
    "packed without config": (
        lambda folder: folder.config.pop("quantization_config"),
        "_blocks is packed in MXFP4, but config.json has no quantization_config.* Add it: {'quant_method': 'mxfp4'",
    ),
    "stale config": (
        lambda folder: (_unpack(folder), folder.config.update(quantization_config=CONFIG["quantization_config"])),
        "quantization_config of mxfp4, but no expert is packed; remove it",
    ),
    "another method": (
        lambda folder: folder.config.update(quantization_config={"quant_method": "awq"}),
        "method 'awq'; Moesaic reads 'mxfp4'",
    ),
    "experts kept out": (
        lambda folder: folder.config.update(
            quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.experts"]}
        ),
        "modules_to_not_convert is .* but the experts are packed",
    ),
    "packed twice": (_mixed, "down_proj says once more what other tensors say of these experts"),
    "half packed": (lambda folder: folder.only().pop(SCALE), f"1 tensors are missing, the first is {SCALE}"),
    "a tensor twice": (_duplicate, r"lies in .*a\.safetensors and in .*b\.safetensors; remove one"),
    "listed in another file": (_listed_elsewhere, r"lists .* in b\.safetensors, which does not hold it"),
    "whole model beside shards": (_both, r"holds model\.safetensors and an index of other files"),
    "a pickle listed": (lambda folder: setattr(folder, "index", {"a": "a.bin"}), r"lists a\.bin; only safetensors"),
    "no weight_map": (lambda folder: folder.files.update({INDEX: b'{"metadata": {}}'}), "has no weight_map"),
    "empty weight_map": (lambda folder: setattr(folder, "index", {}), "has no weight_map"),
    "numbers for files": (
        lambda folder: folder.files.update({INDEX: b'{"weight_map": {"a": 1}}'}),
        "has no weight_map",
    ),
    "index in UTF-16": (lambda folder: folder.files.update({INDEX: "{}".encode("utf-16")}), "is text in UTF-16"),
    "shard missing": (
        lambda folder: (folder.split("a.safetensors", "b.safetensors"), folder.shards.pop("b.safetensors")),
        r"b\.safetensors, which .* lists, is missing",
    ),
    "weights below only": (
        lambda folder: setattr(folder, "shards", {"sub/model.safetensors": dict(TENSORS)}),
        r"no model\.safetensors\.index\.json that would list sub/model\.safetensors",
    ),
    "adapter file": (lambda folder: folder.files.update({"adapter_config.json": b"{}"}), "is of an adapter"),
    "adapter tensors": (
        lambda folder: folder.only().update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}),
        r"lora_A\.weight is of an adapter; merge it",
    ),
    "experts of a width that is not packed": (
        lambda folder: folder.config.update(intermediate_size=40),
        "expert width 40 cannot be stored in MXFP4, which packs multiples of 32",
    ),
    "another quantization": (
        lambda folder: folder.only().update({"model.layers.0.self_attn.k_proj.output_scale": torch.ones(1)}),
        r"k_proj\.output_scale is of a quantization, or a KV cache, that Moesaic does not read",
    ),
    "more layers": (
        lambda folder: folder.only().update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
        "is of layer 2; the config has layers 0 to 1",
    ),
    "integers for weights": (
        lambda folder: folder.only().update({BIAS: torch.ones(2, dtype=torch.int8)}),
        "router.bias is of type I8; allowed are F64, F32, F16, BF16",
    ),
    "GPTQ": (
        lambda folder: folder.only().update({"model.layers.0.self_attn.q_proj.g_idx": torch.ones(2)}),
        r"q_proj\.g_idx is of a quantization",
    ),
    "MLX": (
        lambda folder: folder.only().update({"model.layers.0.self_attn.q_proj.biases": torch.ones(2, 2)}),
        r"q_proj\.biases is of a quantization, .* give the model without, in BF16",
    ),
    "bitsandbytes, in the place of the weight": (
        lambda folder: folder.only().update(
            {
                "model.layers.0.self_attn.q_proj.weight": torch.ones(8, 1, dtype=torch.uint8),
                "model.layers.0.self_attn.q_proj.weight.absmax": torch.ones(2),
            }
        ),
        r"q_proj\.weight\.absmax is of a quantization",
    ),
    "tied embeddings": (
        lambda folder: folder.only().pop(layout.HEAD),
        r"1 tensors are missing, the first is lm_head\.weight; a model whose embedding is its head as well is not read",
    ),
    "names of a larger model": (
        lambda folder: folder.only().update(
            {f"language_model.{layout.FINAL_NORM}": folder.only().pop(layout.FINAL_NORM)}
        ),
        r"the first is model\.norm\.weight; there is language_model\.model\.norm\.weight, which nothing here reads",
    ),
    "an absolute path": (
        lambda folder: setattr(folder, "index", dict.fromkeys(TENSORS, "/model.safetensors")),
        r"lists /model\.safetensors, which is outside of the model's directory",
    ),
    "a path out of the folder": (
        lambda folder: setattr(folder, "index", dict.fromkeys(TENSORS, "a/../../model.safetensors")),
        r"lists a/\.\./\.\./model\.safetensors, which is outside",
    ),
    "an unfinished download": (
        lambda folder: folder.files.update({"model.safetensors.aria2": b"\0\1"}),
        r"model\.safetensors is not all there yet, by model\.safetensors\.aria2 beside it; finish its download",
    ),
    "a web page": (
        lambda folder: folder.files.update({"x.safetensors": b"<!DOCTYPE html><title>log in"}),
        r"x\.safetensors is not a safetensors file: it is a web page",
    ),
    "another program's": (
        lambda folder: (setattr(folder, "shards", {}), folder.files.update({"a.gguf": b"GGUF"})),
        r"holds no safetensors files; a\.gguf is of llama\.cpp",
    ),
    "original/ alone": (
        lambda folder: setattr(folder, "shards", {"original/model.safetensors": dict(TENSORS)}),
        r"original/ has them in a format of its own",
    ),
    "an empty file": (
        lambda folder: folder.files.update({"x.safetensors": b""}),
        r"x\.safetensors is not a safetensors file: it is empty",
    ),
    "zeros": (
        lambda folder: folder.files.update({"x.safetensors": bytes(64)}),
        r"x\.safetensors is not a safetensors file: its header is broken",
    ),
    "a name that is no text": (
        lambda folder: folder.files.update({"caf\udce9.txt": b""}),
        r"a file whose name is not UTF-8, 'caf\\udce9\.txt'; rename it",
    ),
    "a truncated file": (
        lambda folder: folder.files.update({"x.safetensors": b"\x08\0\0\0\0\0\0\0{}      12345"}),
        r"x\.safetensors goes on after its header says that it ends",
    ),
    "an LFS pointer": (
        lambda folder: folder.files.update({"x.safetensors": b"version https://git-lfs.github.com/spec/v1"}),
        r"x\.safetensors is not a safetensors file: it is a Git LFS pointer",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named_at_the_first_look(tmp_path: Path, name: str) -> None:
    change, message = CONTRADICTIONS[name]
    folder = Folder()
    change(folder)
    with pytest.raises(ArtifactError, match=message):
        Checkpoint.open(folder.write(tmp_path / "model"))


@pytest.mark.parametrize("file", ["chat_template.jinja", "model.safetensors", "config.json"])
def test_a_link_without_its_file_is_named(tmp_path: Path, file: str) -> None:
    directory = Folder().write(tmp_path / "model")
    (directory / file).unlink(missing_ok=True)
    (directory / file).symlink_to("../../blobs/0123")
    with pytest.raises(ArtifactError, match=rf"{file} is a link to \.\./\.\./blobs/0123, which does not exist"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_in_a_files_place_is_named(tmp_path: Path, file: str) -> None:
    folder = Folder().write(tmp_path / "model")
    (folder / file).mkdir()
    with pytest.raises(ArtifactError, match=rf"{file} is no file, and by its name it must be one; download it again"):
        Checkpoint.open(folder)


def test_a_cache_of_links_is_read_like_files(tmp_path: Path) -> None:
    directory = Folder().write(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in directory.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    assert_is_the_reference(tmp_path / "snapshot")


@pytest.mark.parametrize("kind", ["file", "config is a folder", "shard is a folder", "nothing"])
def test_a_path_that_is_no_checkpoint_is_told(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "model"
    if kind == "file":
        directory.write_text("x")
    elif kind == "config is a folder":
        (directory / "config.json").mkdir(parents=True)
    elif kind == "shard is a folder":
        Folder().write(directory)
        (directory / "x.safetensors").mkdir()
    with pytest.raises(ArtifactError, match="model"):
        Checkpoint.open(directory)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, whole = Folder().write(tmp_path / "model"), Path.open

    def locked(path: Path, *args: object, **options: object) -> object:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read: Permission denied"):
        Checkpoint.open(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [(BIAS, math.nan), (BIAS, math.inf), (SCALE, 255), (layout.EMBEDDING, -math.inf), (layout.FINAL_NORM, math.nan)],
)
def test_a_number_that_is_not_finite_is_named(tmp_path: Path, name: str, value: float) -> None:
    folder = Folder()
    damaged = TENSORS[name].clone()
    damaged.view(-1)[-1] = value
    folder.only()[name] = damaged
    directory = folder.write(tmp_path / "model")
    for read in (load_model, lambda path: check_weights(Checkpoint.open(path))):
        with pytest.raises(ArtifactError, match=f"{name} has numbers that are not finite"):
            read(directory)


def test_a_number_that_no_model_is_computed_with_is_named(tmp_path: Path) -> None:
    """Finite where it is stored, and not in what models are computed in."""
    folder = Folder()
    _in_other_floats(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    folder.only()[name][0, 0] = 1e300
    directory = folder.write(tmp_path / "model")
    for read in (load_model, lambda path: check_weights(Checkpoint.open(path))):
        with pytest.raises(ArtifactError, match=f"{name} has numbers that are not finite"):
            read(directory)


@pytest.mark.parametrize("row", [Block(2, 1, 32, 8), None])
def test_scales_of_a_cache_are_not_inherited(tmp_path: Path, row: Block | None) -> None:
    folder = Folder()
    folder.only()["model.layers.0.self_attn.k_scale"] = torch.tensor(0.5)
    checkpoint = Checkpoint.open(folder.write(tmp_path / "model"))
    with pytest.raises(ArtifactError, match="k_scale of a calibrated KV cache, which do not hold for a child"):
        checkpoint.check_prunable()
    assert checkpoint.unused == []


CHANGES: list[Callable[[Folder], object]] = [
    *(change for change in LAYOUTS.values()),
    *(change for change, _ in CONTRADICTIONS.values()),
]
WHERE = st.tuples(
    st.sampled_from(["config.json", "model.safetensors", INDEX]), st.integers(0, 400), st.binary(max_size=3)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CHANGES), max_size=3), st.none() | WHERE)
def test_any_layout_is_the_reference_or_refused(
    changes: list[Callable[[Folder], object]], damage: tuple[str, int, bytes] | None
) -> None:
    folder = Folder()
    for change in changes:
        with suppress(KeyError, ValueError, StopIteration):  # of a change that another one has left nothing for
            change(folder)
    with TemporaryDirectory() as place:
        directory = folder.write(Path(place) / "model")
        for path in _damaged(directory, damage):
            assert path.is_file()
        try:
            load_model(directory)
        except MoesaicError:
            event("refused")
            return
        if damage is None:
            assert_is_the_reference(directory)


def _damaged(directory: Path, damage: tuple[str, int, bytes] | None) -> Iterator[Path]:
    """Bytes put over a file's own, near its beginning or its end."""
    if damage is None or not (path := directory / damage[0]).is_file():
        return
    content, place = path.read_bytes(), damage[1]
    path.write_bytes(content[:place] + damage[2] if damage[2] == b"" else content[:place] + damage[2] + content[place:])
    yield path


def test_the_plain_layout_is_what_safetensors_reads(tmp_path: Path) -> None:
    directory = Folder().write(tmp_path / "model")
    checkpoint = Checkpoint.open(directory)
    for name, tensor in load_file(directory / "model.safetensors").items():
        assert torch.equal(checkpoint.tensor(name), tensor) and torch.equal(checkpoint.stored(name).read(), tensor)
