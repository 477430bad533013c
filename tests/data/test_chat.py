"""A checkpoint without what a conversation needs is refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from moesaic.core.errors import ArtifactError
from moesaic.data.chat import load_tokenizer


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_chat_template(tiny_parent: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_parent / "tokenizer.json", tmp_path)
    settings = json.loads((tiny_parent / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ArtifactError, match="no chat template"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("added", [["<|new|>"], ["w900", "<|image|>"]])
def test_a_token_that_the_embedding_has_no_row_for_is_named(
    tiny_parent: Path, tmp_path: Path, added: list[str]
) -> None:
    model = Path(shutil.copytree(tiny_parent, tmp_path / "model"))
    tokenizer = load_tokenizer(tiny_parent)
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.save_pretrained(model)
    last = f"the token {added[-1]!r} with id {63 + len(added)}".replace("|", r"\|")
    with pytest.raises(ArtifactError, match=f"{last}, but the model's embedding ends at 63"):
        load_tokenizer(model)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{\x00}\x00", "is text in UTF-16"),
        (b"\x1f\x8b\x08", "is compressed by gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b'"\xe9"', "is not UTF-8 text"),
    ],
)
def test_a_file_of_a_tokenizer_that_is_something_else_is_named(
    tiny_parent: Path, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_parent / name, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{file} {message}"):
        load_tokenizer(tmp_path)
