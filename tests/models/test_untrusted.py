"""Nothing that is read can run: no pickle, no remote code, no template that reaches Python, no object in YAML."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moesaic.core.errors import ArtifactError, ConfigError
from moesaic.data.chat import load_tokenizer, render_conversation
from moesaic.data.verifiers import math
from moesaic.models.whole_model import load_model
from moesaic.platform.cluster.profile import read_profile

ROOT = Path(__file__).parents[2]
SOURCES = ("src", "components", "pipelines", "images", "examples", "benchmarks")
UNPICKLING = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
TREES = {path: ast.parse(path.read_text()) for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))}


def calls(name: str) -> Iterator[tuple[Path, ast.Call]]:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                yield path, node


def test_no_module_unpickles() -> None:
    """Ruff's S rules look for the calls; this looks for whoever could make them."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [path for name in names if name.partition(".")[0] in UNPICKLING]
    assert len(TREES) > 200 and found == []


def test_torch_loads_weights_only() -> None:
    options = [{word.arg: ast.unparse(word.value) for word in call.keywords} for _, call in calls("torch.load")]
    assert options and all(given.get("weights_only") == "True" for given in options)


def test_remote_code_is_never_asked_for() -> None:
    said = [
        ast.unparse(value)
        for tree in TREES.values()
        for node in ast.walk(tree)
        for name, value in _named_values(node)
        if name == "trust_remote_code"
    ]
    assert "False" in said and "True" not in said


def _named_values(node: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
    if isinstance(node, ast.keyword):
        yield node.arg, node.value
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            yield key.value if isinstance(key, ast.Constant) else None, value


@pytest.fixture
def hostile(tiny_parent: Path, tmp_path: Path) -> Path:
    """A checkpoint with code of its own, named wherever transformers would look for it."""
    directory = Path(shutil.copytree(tiny_parent, tmp_path / "hostile"))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: pass\n")
    own = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    for file, added in (
        ("config.json", own | {"AutoTokenizer": ["own.Own", "own.Own"]}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
    ):
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps(content | {"auto_map": added}))
    return directory


def test_code_that_comes_with_a_checkpoint_does_not_run(hostile: Path, tmp_path: Path) -> None:
    assert type(load_model(hostile)).__module__.startswith(("transformers.", "moesaic."))
    assert load_tokenizer(hostile).chat_template
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_cannot_reach_python(hostile: Path) -> None:
    (hostile / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ArtifactError, match=r"access to attribute '__class__' of .* is unsafe"):
        render_conversation([{"role": "user", "content": "x"}], load_tokenizer(hostile), "low")


@pytest.mark.parametrize(
    "final",
    ["{}", "\\boxed{{{}}}", "$ {} $", "The final answer is {}. I hope it is right.", "answer: 1+({})", "= 1*{}"],
)
def test_a_reply_that_is_graded_does_not_run(final: str, tmp_path: Path) -> None:
    """The text that math-verify hands to sympy, which evaluates it, has digits and operators only."""
    written = tmp_path / "ran"
    assert not math(final.format(f"__import__('pathlib').Path('{written}').touch()"), "3")
    assert not written.exists()


def test_yaml_makes_no_objects(tmp_path: Path) -> None:
    (tmp_path / "profile.yaml").write_text(f"!!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    with pytest.raises(ConfigError, match="is no YAML"):
        read_profile(tmp_path / "profile.yaml")
    assert not (tmp_path / "ran").exists()
