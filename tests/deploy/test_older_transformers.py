"""transformers 4.57, which TensorRT-LLM 1.2.1 has, reads a bundle's config and tokenizer; the model's class needs 5."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.data.chat import load_tokenizer
from moesaic.deploy.export_engine.bundle import write_bundle
from moesaic.deploy.export_engine.stage import ExportEngineConfig
from moesaic.models.checkpoint import Checkpoint
from moesaic.pipelines import example

pytestmark = pytest.mark.engine
OLDER = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0")
READS = """
import json, sys, transformers
from transformers import AutoConfig, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
asked = [{"role": "user", "content": "add 1 2"}]
print(json.dumps({
    "version": transformers.__version__,
    "prompt": tokenizer.apply_chat_template(asked, add_generation_prompt=True, reasoning_effort="low"),
    "special": tokenizer.all_special_ids,
    "blocks": config.block_configs,
    "windows": config.windows,
    "rope": [config.rope_theta, config.rope_scaling["factor"]],
}))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put in front of our own packages."""
    folder = tmp_path_factory.mktemp("older")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLDER]
    subprocess.run(pip, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("target", ["tensorrt_llm", "vllm"])
def test_it_reads_what_transformers_5_reads(target: str, older: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    config = ExportEngineConfig(target=target, kv_cache="bf16", compare_outputs=False)
    write_bundle(Checkpoint.open(example() / "parent"), bundle, config)
    own = os.environ | {"PYTHONPATH": str(older), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", READS, str(bundle)], env=own, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"] == "4.57.6"
    tokenizer = load_tokenizer(bundle)
    asked = [{"role": "user", "content": "add 1 2"}]
    now = tokenizer.apply_chat_template(asked, add_generation_prompt=True, reasoning_effort="low", return_dict=False)
    assert found["prompt"] == now
    assert sorted(found["special"]) == sorted(tokenizer.all_special_ids)
    blocks = Checkpoint.open(bundle).architecture.blocks
    assert found["blocks"] == [block.as_config() for block in blocks]
    assert found["windows"] == [block.window for block in blocks]
    assert found["rope"] == [10000.0, 8.0]
