"""Write a training checkpoint as gpt-oss-120b is stored: `python -m examples.tiny_reasoner.export --run DIR --out DIR`.

Expert matrices become MXFP4 blocks and scales, everything else BF16, in two shards with an index. config.json carries
the rope settings under the old names and the new one, since engines read either.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import GptOssConfig

from examples.tiny_reasoner.model import reasoner_config
from examples.tiny_reasoner.quantized import is_expert_matrix
from examples.tiny_reasoner.tokenizer import PAD_ID, RETURN_ID, build_tokenizer
from moesaic.models import mxfp4
from moesaic.models.checkpoint import write_checkpoint
from moesaic.models.families.gpt_oss import NOT_PACKED

NUM_SHARDS = 2
UNUSED = ("_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "problem_type")


def stored_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under their on-disk names; the rows of packed matrices are output features."""
    stored = {}
    for name, value in state.items():
        if is_expert_matrix(name):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4.quantize(value.mT.contiguous())
        else:
            stored[name] = value.to(torch.bfloat16).contiguous()
    return stored


def config_values(config: GptOssConfig) -> dict[str, object]:
    """config.json, readable by transformers of either rope convention."""
    values = {key: value for key, value in config.to_dict().items() if key not in UNUSED}
    rope = dict(values["rope_parameters"])
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return values | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "rope_parameters": rope,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": NOT_PACKED},
    }


def write_json(path: Path, values: object) -> None:
    """Sorted and indented, so that a change shows as one line."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def shards(tensors: dict[str, Tensor]) -> list[tuple[str, dict[str, Tensor]]]:
    """Consecutive tensors in shards of about equal bytes, as gpt-oss is sharded: layers may straddle them."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    parts: list[dict[str, Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name, tensor in tensors.items():
        parts[min(NUM_SHARDS - 1, written * NUM_SHARDS // total)][name] = tensor
        written += tensor.nbytes
    return [(f"model-{number:05d}-of-{NUM_SHARDS:05d}", part) for number, part in enumerate(parts, 1)]


def write_parent(out: Path, config: GptOssConfig, state: dict[str, Tensor]) -> None:
    """The whole checkpoint directory, in place of an earlier one."""
    shutil.rmtree(out, ignore_errors=True)
    write_checkpoint(out, config_values(config), shards(stored_tensors(state)))
    generation = {"bos_token_id": PAD_ID, "eos_token_id": RETURN_ID, "pad_token_id": PAD_ID, "do_sample": False}
    write_json(out / "generation_config.json", generation)
    write_tokenizer(out)


def write_tokenizer(out: Path) -> None:
    """The tokenizer's files, under the class name that transformers 4 knows too."""
    build_tokenizer().save_pretrained(out)
    path = out / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, values)


def checkpoint_weights(run: Path) -> dict[str, Tensor]:
    """The exact float32 weights of a training run."""
    weights: dict[str, Tensor] = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    return weights


def main(config: GptOssConfig | None = None, out: Path = Path(__file__).parent / "parent") -> None:
    """Export a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the training run's --out")
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    write_parent(arguments.out, config or reasoner_config(), checkpoint_weights(arguments.run))


if __name__ == "__main__":
    main()
