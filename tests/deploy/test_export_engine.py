"""Bundles of a child whose layers differ, made by the stage; and bundles with one thing wrong, refused for that reason.

A wrong bundle is a copy that was damaged and sealed again, so that its digests are right and only the deeper check
sees it. No engine is here: what a model module builds is found out against stand-ins, in a process of its own.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.command_line.main import main
from moesaic.core.errors import ArtifactError, ConfigError, StageError
from moesaic.deploy.export_engine import run as export_engine
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.bundle_manifest import BundleManifest, Digests, seal
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.deploy.export_engine.validation import compare_logits, validate
from moesaic.models import kv_cache, layout
from moesaic.models.architecture import Architecture, Block
from moesaic.models.checkpoint import Checkpoint, layer_shards, read_recovery, rewrite_checkpoint, write_checkpoint
from moesaic.models.kv_cache import UNIT, KvScales
from moesaic.models.whole_model import load_model
from tests.children import first_of
from tests.export_standins.probe import check_built

BLOCKS = Architecture.of([Block(4, 2, 64, 8), Block(8, 1, 64), Block(2, 2, 32, 8), Block(6, 1, 64, 5)])
SCALES = [KvScales(0.03, 0.75), KvScales(0.5, 2.0), UNIT, KvScales(1.5, 0.001)]
FOLDED = [KvScales(2**-5, 1.0), KvScales(0.5, 2.0), UNIT, KvScales(2.0, 2**-9)]
"""The next powers of two."""
TRTLLM = ExportEngineConfig(target="tensorrt_llm", max_batch_size=16, max_num_tokens=64)
VLLM = ExportEngineConfig(target="vllm", max_seq_len=256, tensor_parallel_size=2, expert_parallel_size=2)


def write_child(
    parent: Checkpoint, directory: Path, scales: list[KvScales] | None = None, yarn_factor: float | None = None
) -> Path:
    def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "model-outer", {name: parent.tensor(name) for name in layout.outer_specs(parent.shape)}
        for layer, block in enumerate(BLOCKS.blocks):
            tensors = {name: parent.tensor(name) for name in parent.layer_names(layer)}
            yield from layer_shards(layer, first_of(tensors, block))

    bare = directory.with_name(f"{directory.name}-bare")
    config = layout.child_config(parent.config, BLOCKS, yarn_factor)
    write_checkpoint(bare, config, shards(), parent.directory.glob("tokenizer*"))
    (bare / "pruning.json").write_text(json.dumps({"candidate": "puzzle", "kept_experts": [[0]]}))
    added = kv_cache.scale_tensors(scales or SCALES)
    rewrite_checkpoint(Checkpoint.open(bare), directory, {}, {"stage": "calibrate_kv"}, added, "model-kv-scales")
    return directory


@pytest.fixture(scope="module")
def child(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_child(tiny_checkpoint, tmp_path_factory.mktemp("export") / "child")


@pytest.fixture(scope="module")
def trtllm(child: Path) -> Path:
    """Made by the stage, so checked, its logits compared with the child's."""
    output, scratch = child.with_name("trtllm"), child.with_name("scratch")
    output.mkdir()
    scratch.mkdir()
    metrics = export_engine.run(TRTLLM, child=child, output=output, scratch=scratch)
    assert metrics["checks"] == 6
    assert metrics["largest_scale"] == 2.0
    return output


@pytest.fixture(scope="module")
def vllm(child: Path) -> Path:
    """Written, and not checked yet."""
    write_bundle(Checkpoint.open(child), child.with_name("vllm"), VLLM)
    return child.with_name("vllm")


def damaged(bundle: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    damage(copy)
    seal(copy, BundleManifest.read(copy))
    return copy


def refused(bundle: Path, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        list(validate(bundle))


def edit_json(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        content = json.loads((bundle / name).read_text())
        change(content)
        (bundle / name).write_text(json.dumps(content))

    return edit


def edit_block(config: Any, layer: int, **values: int) -> None:
    config["block_configs"][layer].update(values)
    config["per_layer_config"][str(layer)].update(values)


def edit_yaml(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        content = yaml.safe_load((bundle / "serve.yaml").read_text())
        change(content)
        (bundle / "serve.yaml").write_text(yaml.safe_dump(content))

    return edit


def edit_text(name: str, old: str, new: str) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        text = (bundle / name).read_text()
        assert text.count(old) == 1
        (bundle / name).write_text(text.replace(old, new))

    return edit


def edit_shard(name: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def edit(bundle: Path) -> None:
        tensors = load_file(bundle / name)
        change(tensors)
        save_file(tensors, bundle / name)

    return edit


def test_the_bundle_tells_what_it_is_and_where_it_comes_from(child: Path, trtllm: Path) -> None:
    manifest = BundleManifest.read(trtllm)
    assert [(layer.num_local_experts, layer.sliding_window) for layer in manifest.layers] == [
        (4, 8),
        (8, None),
        (2, 8),
        (6, 5),
    ]
    assert [KvScales(layer.key_scale or 0, layer.value_scale or 0) for layer in manifest.layers] == FOLDED
    assert (manifest.kv_cache.kind, manifest.kv_cache.scales) == ("fp8", "folded")
    assert manifest.source.digest == Digests().of_all(child)
    assert manifest.source.pruning == {"candidate": "puzzle", "kept_experts": [[0]]}
    assert [step["stage"] for step in manifest.source.steps] == ["calibrate_kv"]
    assert [step["stage"] for step in read_recovery(trtllm)] == ["calibrate_kv", "export_engine"]
    found = json.loads((trtllm / "validation.json").read_text())
    assert (found["passed"], len(found["checks"])) == (True, 6)
    assert found["verdict"] == "unverified: files and layout checked; no engine has loaded it"
    names = {entry.path for entry in manifest.files}
    assert {"trtllm/__init__.py", "trtllm/modeling_gpt_oss_puzzle.py", "hf_quant_config.json"} <= names
    assert {"serve.yaml", "bench.yaml", "README.md", "config.json", "tokenizer.json"} <= names


def test_tensorrt_llm_is_told_what_it_would_guess_wrongly(trtllm: Path) -> None:
    """Expert kernels, FP8 twice, one window for every layer with 512 for full, and no format left open."""
    for name in ("serve.yaml", "bench.yaml"):
        settings = yaml.safe_load((trtllm / name).read_text())
        assert settings["moe_config"] == {"backend": "TRITON"}
        assert settings["kv_cache_config"]["dtype"] == "fp8"
        assert settings["kv_cache_config"]["max_attention_window"] == [8, 512, 8, 5]
        assert settings["max_seq_len"] == 512
        assert not settings["trust_remote_code"]
        assert "pipeline_parallel_size" not in settings
    quantization = json.loads((trtllm / "hf_quant_config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["kv_cache_quant_algo"]) == ("W4A16_MXFP4", "FP8")
    readme = (trtllm / "README.md").read_text()
    assert 'trtllm-serve "$PWD" --backend pytorch --config serve.yaml --custom_module_dirs "$PWD/trtllm"' in readme
    assert "--config bench.yaml --custom_module_dirs" in readme
    assert 'PYTHONPATH="$PWD' in readme


def test_unchanged_shards_are_the_childs_own_files(child: Path, trtllm: Path, vllm: Path) -> None:
    """Experts in both; in layer 2, whose scales are 1, folding changes nothing; for vLLM no tensor changes."""
    for shard in child.glob("*.safetensors"):
        assert (vllm / shard.name).samefile(shard)
        folded = shard.stem in {f"model-layer-00{layer}-rest" for layer in (0, 1, 3)} | {"model-kv-scales"}
        assert (trtllm / shard.name).samefile(shard) == (not folded)


@torch.inference_mode()
def test_folded_at_unit_scale_is_the_child_at_powers_of_two(child: Path, trtllm: Path) -> None:
    tokens = torch.arange(6, 46).unsqueeze(0)
    models = load_model(child), load_model(trtllm)
    kv_cache.emulate(models[0], kv_cache.roundings("fp8", FOLDED))
    kv_cache.emulate(models[1], kv_cache.roundings("fp8_unit", [UNIT] * 4))
    assert torch.equal(models[0](tokens, use_cache=True).logits, models[1](tokens, use_cache=True).logits)
    assert kv_cache.read_scales(Checkpoint.open(trtllm)) == [UNIT] * 4


def test_vllm_gets_scale_tensors_arguments_and_a_plugin(vllm: Path, trtllm: Path) -> None:
    scales = kv_cache.read_scales(Checkpoint.open(vllm))
    assert [scale.key for scale in scales] == pytest.approx([scale.key for scale in SCALES])
    arguments = (vllm / "serve.args").read_text().split()
    assert arguments[arguments.index("--kv-cache-dtype") + 1] == "fp8"
    assert arguments[arguments.index("--max-model-len") + 1] == "256"
    assert "--enable-expert-parallel" in arguments
    assert not (vllm / "hf_quant_config.json").exists()
    assert "vllm_plugin" in (vllm / "README.md").read_text()
    for bundle in (trtllm, vllm):
        said = " ".join((bundle / "README.md").read_text().split())
        assert (
            "in what a user or a tool wrote become control tokens there" in said and "send and read token ids" in said
        )


@pytest.mark.parametrize("config", [TRTLLM, VLLM])
def test_engines_get_the_childs_yarn_factor(
    tiny_checkpoint: Checkpoint, tmp_path: Path, config: ExportEngineConfig
) -> None:
    stretched = write_child(tiny_checkpoint, tmp_path / "child", yarn_factor=7.0)
    write_bundle(Checkpoint.open(stretched), tmp_path / "bundle", config)
    written = json.loads((tmp_path / "bundle/config.json").read_text())
    assert written["rope_scaling"]["factor"] == written["rope_parameters"]["factor"] == 7.0
    compare_logits(stretched, tmp_path / "bundle")


def test_validate_is_a_command(child: Path, vllm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(vllm), "--child", str(child)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok  ") == 6
    assert shown.endswith("vllm is unverified: files and layout checked; no engine has loaded it\n")
    assert main(["validate", str(child)]) == 2
    assert "holds no export_manifest.json" in capsys.readouterr().err


def test_vllm_would_find_the_plugin_where_it_lies(vllm: Path) -> None:
    (found,) = distributions(path=[str(vllm / "vllm_plugin")])
    (entry,) = found.entry_points.select(group="vllm.general_plugins")
    assert entry.value == "gpt_oss_puzzle_vllm:register"
    assert (vllm / "vllm_plugin" / "gpt_oss_puzzle_vllm" / "configuration_gpt_oss_puzzle.py").is_file()


def shorten_windows(settings: Any) -> None:
    settings["kv_cache_config"]["max_attention_window"].pop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shorten_windows, "max_attention_window has 3 entries for 4 layers; the engine would repeat them"),
        (lambda s: s["kv_cache_config"].update(max_attention_window=[8, 8, 8, 5]), "of layer 1 is 8; .* 512 tokens"),
        (lambda s: s["kv_cache_config"].pop("dtype"), "kv_cache_config.dtype is missing"),
        (lambda s: s["kv_cache_config"].update(dtype="auto"), "exported for .*'dtype': 'fp8'"),
        (lambda s: s.pop("moe_config"), "moe_config is missing"),
        (lambda s: s["moe_config"].update(backend="AUTO"), "moe_config is {'backend': 'AUTO'}"),
        (lambda s: s.update(pipeline_parallel_size=2), "knows no key pipeline_parallel_size"),
        (lambda s: s["kv_cache_config"].update(windows=[]), "knows no key kv_cache_config.windows"),
        (lambda s: s.update(max_batch_size="16"), "max_batch_size is '16'; it must be of type int"),
        (lambda s: s.pop("max_seq_len"), "max_seq_len is missing"),
    ],
)
def test_wrong_settings_are_refused(trtllm: Path, tmp_path: Path, change: Callable[[Any], object], reason: str) -> None:
    refused(damaged(trtllm, tmp_path, edit_yaml(change)), reason)


def test_an_open_weight_format_is_refused(trtllm: Path, tmp_path: Path) -> None:
    """With a null ``quant_algo`` the engine would also lose what the file says of the KV cache."""
    damage = edit_json("hf_quant_config.json", lambda content: content["quantization"].update(quant_algo=None))
    refused(damaged(trtllm, tmp_path, damage), "it must say .*W4A16_MXFP4")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("rope_scaling"), "must hold rope_parameters, rope_scaling and rope_theta"),
        (lambda c: c.pop("rope_theta"), "rope_theta is 10000.0 in rope_parameters, and 150000.0"),
        (lambda c: c.pop("rope_parameters"), "must hold rope_parameters, rope_scaling and rope_theta"),
        (lambda c: c["rope_scaling"].update(factor=32.0), "factor is 4.0 in rope_parameters, and 32.0 by all"),
        (lambda c: c.update(rope_theta=150000.0), "rope_theta is 10000.0 in rope_parameters, and 150000.0"),
        (lambda c: [c[key].pop("beta_fast") for key in ("rope_scaling", "rope_parameters")], "RoPE has no beta_fast"),
        (lambda c: edit_block(c, 2, num_local_experts=3), "router.weight has shape .2,.* asks for .3,"),
        (lambda c: edit_block(c, 3, sliding_window=6), "not the layers of the manifest"),
        (lambda c: c["block_configs"][3].update(sliding_window=6), "per_layer_config say different things"),
        (lambda c: c.update(rms_norm_eps=1e-6), "rms_norm_eps is 1e-06"),
        (lambda c: c.update(swiglu_limit=5.0), "swiglu_limit is 5.0"),
    ],
)
def test_a_wrong_config_is_refused(vllm: Path, tmp_path: Path, change: Callable[[Any], object], reason: str) -> None:
    refused(damaged(vllm, tmp_path, edit_json("config.json", change)), reason)


def test_expert_rows_off_by_one_are_refused(vllm: Path, tmp_path: Path) -> None:
    name = "model.layers.3.mlp.experts.down_proj_blocks"
    shard = "model-layer-003-experts.safetensors"
    damage = edit_shard(shard, lambda tensors: tensors.update({name: tensors[name][:5].clone()}))
    refused(damaged(vllm, tmp_path, damage), r"down_proj_blocks has shape \(5, .* asks for \(6, ")


@pytest.mark.parametrize("engine", ["trtllm", "vllm"])
def test_a_missing_scale_is_refused(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    name = "model.layers.1.self_attn.v_scale"

    def damage(bundle: Path) -> None:
        edit_shard("model-kv-scales.safetensors", lambda tensors: tensors.pop(name))(bundle)
        edit_json("model.safetensors.index.json", lambda index: index["weight_map"].pop(name))(bundle)

    refused(damaged(request.getfixturevalue(engine), tmp_path, damage), f"has no {name}; the engine would take a")


def test_scales_that_are_folded_and_kept_are_refused(trtllm: Path, tmp_path: Path) -> None:
    scales = kv_cache.scale_tensors(FOLDED)
    damage = edit_shard("model-kv-scales.safetensors", lambda tensors: tensors.update(scales))
    refused(damaged(trtllm, tmp_path, damage), "k_scale is 0.03125; where scales are folded it is 1.0")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("--kv-cache-dtype fp8\n", "", "kv_cache_dtype is None; the bundle was exported for fp8"),
        ("--max-model-len 256", "--max-model-len 255", "max_model_len is 255"),
        ("--max-num-seqs 256\n", "", "required: --max-num-seqs"),
        ("--enable-expert-parallel", "--trust-remote-code", "unrecognized arguments: --trust-remote-code"),
    ],
)
def test_wrong_arguments_are_refused(vllm: Path, tmp_path: Path, old: str, new: str, reason: str) -> None:
    refused(damaged(vllm, tmp_path, edit_text("serve.args", old, new)), reason)


def test_files_are_those_of_the_manifest(trtllm: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trtllm, copy)
    (copy / "extra.safetensors").write_bytes(b"")
    refused(copy, "extra.safetensors is not in export_manifest.json")
    (copy / "extra.safetensors").unlink()
    shard = copy / "model-outer.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(copy, "model-outer.safetensors was changed")
    shard.write_bytes(content[:-1])
    refused(copy, "model-outer.safetensors has .* bytes")
    shard.unlink()
    refused(copy, "model-outer.safetensors is missing")


WINDOW = "self.attn.sliding_window = config.sliding_window"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("engine", "name", "old", "new", "reason"),
    [
        (
            "trtllm",
            "trtllm/modeling_gpt_oss_puzzle.py",
            WINDOW,
            "_ = None",
            "layer 3 would have window None in the engine; it has 5",
        ),
        (
            "trtllm",
            "trtllm/modeling_gpt_oss_puzzle.py",
            "whole if layer is None else whole.get_gpt_oss_config_for_layer(layer)",
            "whole",
            "does not build the model: IndexError",
        ),
    ],
)
def test_what_the_stand_in_builds_of_a_wrong_module_is_compared(
    engine: str,
    name: str,
    old: str,
    new: str,
    reason: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The engines' own rules come through: windows on even layers, one number of experts, scales passed over."""
    with pytest.raises(ArtifactError, match=reason):
        check_built(damaged(request.getfixturevalue(engine), tmp_path, edit_text(name, old, new)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_every_layer_is_built_with_its_own_experts_and_window(trtllm: Path) -> None:
    check_built(trtllm)


def test_another_models_bundle_is_told_by_its_logits(trtllm: Path, tiny_parent: Path) -> None:
    with pytest.raises(ArtifactError, match=r"trtllm is not the model in .*: their logits differ"):
        compare_logits(tiny_parent, trtllm)


def test_a_parent_becomes_a_child_of_its_own_layers(tiny_parent: Path, tmp_path: Path) -> None:
    config = ExportEngineConfig(target="tensorrt_llm", kv_cache="bf16", gpu="blackwell", max_seq_len=128)
    manifest = write_bundle(Checkpoint.open(tiny_parent), tmp_path / "bundle", config)
    bundle = Checkpoint.open(tmp_path / "bundle")
    assert bundle.config["model_type"] == "gpt_oss_puzzle"
    assert bundle.architecture == Checkpoint.open(tiny_parent).architecture
    assert manifest.source.pruning is None
    settings = yaml.safe_load((tmp_path / "bundle/serve.yaml").read_text())
    assert settings["kv_cache_config"]["dtype"] == "auto"
    assert settings["kv_cache_config"]["max_attention_window"] == [8, 128, 8, 128]
    assert settings["moe_config"] == {"backend": "TRTLLM"}
    compare_logits(tiny_parent, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_seq_len": 513}, "max_seq_len 513 is more than the model's 512 positions"),
        ({"tensor_parallel_size": 4, "expert_parallel_size": 4}, "does not divide the 2 experts of some layers"),
        ({"tensor_parallel_size": 3}, "tensor_parallel_size 3 does not divide the 4 heads"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(
    child: Path, tmp_path: Path, changes: dict[str, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_bundle(Checkpoint.open(child), tmp_path / "bundle", TRTLLM.model_copy(update=changes))
    assert not list(tmp_path.iterdir())


def test_calibrated_fp8_needs_scales(tiny_parent: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run calibrate_kv on it"):
        write_bundle(Checkpoint.open(tiny_parent), tmp_path / "bundle", TRTLLM)


def test_folding_that_would_lose_bits_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Values divided by 2^-140 are beyond every BF16 number."""
    child = write_child(tiny_checkpoint, tmp_path / "child", [UNIT, UNIT, UNIT, KvScales(1.0, 2**-140)])
    with pytest.raises(StageError, match=r"layers\.3\.self_attn\.v_proj\.weight: scaling it by .* loses bits"):
        write_bundle(Checkpoint.open(child), tmp_path / "bundle", TRTLLM)
    assert not (tmp_path / "bundle").exists()
