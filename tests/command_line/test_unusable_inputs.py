"""What people really feed in: exit code 2 and one line that says what to do, or the store takes what belongs there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moesaic.command_line.main import _add_inputs, main
from moesaic.models.checkpoint_layout import INDEX
from moesaic.pipelines import example
from moesaic.platform.store import Store
from tests.damaged_checkpoints import damaged_copy
from tests.data_sets import write_sets


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_sets(tmp_path / "data")


def _edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(parent: Path) -> None:
        config = json.loads((parent / "config.json").read_text())
        change(config)
        (parent / "config.json").write_text(json.dumps(config))

    return edit


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no quantization": (_edit(lambda config: config.pop("quantization_config")), "no quantization_config"),
    "broken index": (lambda parent: (parent / INDEX).write_text("{}"), "has no weight_map"),
    "unknown layers": (_edit(lambda config: config.update(layer_types=["linear"] * 4)), "layer_type"),
    "latin-1": (lambda parent: (parent / "config.json").write_bytes(b'{"a": "\xe9"}'), "is not UTF-8 text"),
    "dangling link": (lambda parent: (parent / "vocab.txt").symlink_to("gone"), "is a link to gone"),
    "adapter": (lambda parent: (parent / "adapter_config.json").write_text("{}"), "merge it into the weights"),
    "cut short": (
        lambda parent: (parent / "model-outer.safetensors").write_bytes(b"\x00" * 9),
        "model-outer.safetensors is not a safetensors file",
    ),
    "no tokenizer": (lambda parent: (parent / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "no template": (lambda parent: (parent / "chat_template.jinja").unlink(), "has no chat template"),
    "nothing ends a reply": (
        lambda parent: (
            (parent / "generation_config.json").unlink(missing_ok=True),
            _edit(lambda config: config.update(eos_token_id=[]))(parent),
        ),
        "names an eos_token_id: no reply would end",
    ),
    "KV scales": (
        lambda parent: (
            save_file({"model.layers.0.self_attn.k_scale": torch.tensor(1.0)}, parent / "kv.safetensors"),
            (parent / INDEX).unlink(),
        ),
        "of a calibrated KV cache, which do not hold for a child",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_unusable_parent_ends_a_run_before_it_begins(
    tiny_parent: Path, data: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = UNUSABLE[case]
    parent = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    change(parent)
    _refused_run(parent, data, tmp_path, message, capsys)


def _refused_run(
    parent: Path, data: Path, tmp_path: Path, message: str, capsys: pytest.CaptureFixture[str], command: str = "search"
) -> None:
    given = ["--recipe", "tiny_cpu", "--parent", str(parent), "--data", str(data), "--output", str(tmp_path / "run")]
    assert main(["run", command, *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert not (tmp_path / "run" / "store").exists()


def test_a_number_that_is_not_finite_ends_a_run_before_it_begins(
    tiny_parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.mlp.router.bias"
    parent = damaged_copy(tiny_parent, tmp_path / "parent", name, float("nan"))
    _refused_run(parent, data, tmp_path, f"{name} has numbers that are not finite", capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1", "is a Parquet file"),
        (b"\xff\xfe{", "is text in UTF-16"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": 1}', "line 1"),
    ],
)
@pytest.mark.parametrize("name", ["calibration_long.jsonl", "test.jsonl"])
def test_unusable_data_end_a_run_before_it_begins(
    tiny_parent: Path,
    data: Path,
    tmp_path: Path,
    name: str,
    content: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (data / name).write_bytes(content)
    _refused_run(tiny_parent, data, tmp_path, message, capsys)


@pytest.mark.parametrize("name", ["calibration_long.jsonl", "prompts.jsonl", "test.jsonl"])
def test_a_row_that_the_template_refuses_ends_a_run_before_it_begins(
    tiny_parent: Path, data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny reasoner's template knows no tools; it is the second row that has one."""
    parent = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    shutil.copy(example() / "parent" / "chat_template.jinja", parent)
    row = json.loads((data / name).read_text())
    key = "messages" if "messages" in row else "prompt"
    row |= {"id": "second", key: [{"role": "tool", "content": "w1"}, *row[key]]}
    with (data / name).open("a") as file:
        file.write(json.dumps(row) + "\n")
    place = f"{data / name}, line 2" if key == "messages" else "problem 'second'"
    _refused_run(parent, data, tmp_path, f"{place}: the chat template refuses", capsys)


def test_the_store_takes_what_the_checkpoint_is_made_of(tiny_parent: Path, data: Path, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    for extra in ("original/model.safetensors", "metal/model.bin", "optimizer.pt"):
        (parent / extra).parent.mkdir(exist_ok=True)
        (parent / extra).write_bytes(b"x" * 1000)
    taken = _add_inputs(tmp_path / "store", parent, data)
    assert taken.parent == _add_inputs(tmp_path / "store", tiny_parent, data).parent
    paths = {entry.path for entry in Store.at(tmp_path / "store").manifest(taken.parent).files}
    assert paths == {path.name for path in tiny_parent.iterdir()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://huggingface.co/openai/gpt-oss-20b", "is an address; give a model by its folder, or as OWNER/NAME"),
        ("hf://openai/gpt-oss-20b", "is an address"),
        ("openai/gpt-oss-20b@v1", "write openai/gpt-oss-20b --revision v1"),
        (
            "openai/gpt-oss-20b/",
            "there is no folder openai/gpt-oss-20b/; for openai/gpt-oss-20b of a hub write openai/gpt-oss-20b",
        ),
        ("x" * 300 + "/y", "File name too long"),
        ("loop/y/z", "Too many levels of symbolic links"),
        ("file/y/z", "Not a directory"),
    ],
)
def test_a_path_that_is_no_model_is_told_in_a_line(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").touch()
    assert main(["inspect", given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said


def test_tensors_and_keys_nothing_uses_are_told(
    tiny_parent: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By ``inspect``, and by a run, which here ends at the recipe's windows."""
    parent = Path(shutil.copytree(tiny_parent, tmp_path / "parent"))
    (parent / INDEX).unlink()
    save_file({"model.rotary_emb.inv_freq": torch.ones(3)}, parent / "extra.safetensors")
    _edit(
        lambda config: config.update(
            num_nextn_predict_layers=1, use_cache=False, torch_dtype="bfloat16", auto_map={"AutoModel": "m.M"}
        )
    )(parent)
    assert main(["inspect", str(parent)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 tensors, the first is model.rotary_emb.inv_freq" in shown
    assert "not read of config.json: auto_map, num_nextn_predict_layers; transformers" in shown
    given = ["--recipe", "tiny_cpu", "--data", str(data), "--output", str(tmp_path / "run"), "--parent"]
    assert main(["run", "search", *given, str(parent)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == f"{parent}: not used: 1 tensors, the first is model.rotary_emb.inv_freq; a child does not have them"
    )
    assert said[1].startswith(f"{parent}: not read: of config.json: auto_map, num_nextn_predict_layers; transformers")
    assert main(["run", "search", *given, str(tiny_parent)]) == 2
    assert main(["inspect", str(tiny_parent)]) == 0
    assert "not read" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"rounds": 1, "rounds": 2}', "recipe.json is not valid JSON: the key 'rounds' occurs twice"),
        (b"rounds: 1\n", "recipe.json is not valid JSON: Expecting value"),
        (b'{"rounds": Infinity}', "Infinity is not a number that JSON has"),
        (b"\xff\xfe{\x00}\x00", "recipe.json is text in UTF-16"),
        (b"\x1f\x8b\x08", "recipe.json is compressed by gzip"),
        (b'{"round": 1}', "round = 1: Extra inputs are not permitted"),
        (b"[" * 100_000, "recipe.json is not valid JSON"),
    ],
)
def test_a_file_that_is_no_recipe_or_config_is_named(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.json").write_bytes(content)
    for command in (
        ["plan", "search", "--recipe", "recipe.json", "--like", "gpt-oss-20b"],
        ["stage", "report", "recipe.json", "--output", "out"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and message in said and len(said) < 5000


@pytest.mark.parametrize("address", ["gs://bucket/x", "hdfs://x", "file:///tmp/x", "S3://bucket/x", ""])
def test_an_address_that_is_no_store_is_told(
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOESAIC_STORE", raising=False)
    for command in (
        ["run", "search", "--engine", "moesaic", "--recipe", "tiny_cpu", "--store", address],
        ["store", "ls", "--store", address],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{address!r} is no address of a store" in said or "no store is named" in said
    assert not [path for path in tmp_path.iterdir() if ":" in path.name]
