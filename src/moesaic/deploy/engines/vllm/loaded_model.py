"""Runs in vLLM's own environment: loads a bundle by its own arguments, says what was loaded and how it replies.

    python loaded_model.py REQUEST.json ANSWER.json

It imports nothing of Moesaic. The arguments go through the engine's own parser, which refuses what it does not know.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def describe_layers(model: Any) -> list[dict[str, Any]]:
    """What the engine holds of each layer of a loaded model."""
    layers = []
    for layer in model.model.layers:
        attention = layer.attn.attn if hasattr(layer, "attn") else layer.self_attn.attn
        mixture = getattr(layer.mlp, "experts", None)  # a dense layer has none
        experts = mixture and mixture.routed_experts
        layers.append(
            {
                "num_local_experts": experts.global_num_experts if experts else 0,
                "num_experts_per_tok": mixture.router.top_k if mixture else 0,
                "intermediate_size": experts.moe_config.intermediate_size if experts else 0,
                "sliding_window": attention.sliding_window,
                "cache_bytes": attention.kv_cache.element_size(),
                "key_scale": attention._k_scale_float,
                "value_scale": attention._v_scale_float,
            }
        )
    return layers


def reply(engine: Any, prompts: Sequence[Sequence[int]], stop_ids: list[int], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy replies to prompts: token ids, the last a stop id unless cut off, and their log-probabilities."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, stop_token_ids=stop_ids, logprobs=0, detokenize=False
    )
    finished = engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], greedy, use_tqdm=False)
    replies = []
    for request in finished:
        (output,) = request.outputs
        chosen = zip(output.token_ids, output.logprobs, strict=True)
        replies.append(
            {
                "token_ids": list(output.token_ids),
                "logprobs": [options[token].logprob for token, options in chosen],
            }
        )
    return replies


def main(request: Path, answer: Path) -> None:
    """Load, look, ask, and write what was found."""
    import torch
    import vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    wanted = json.loads(request.read_text())
    arguments = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(wanted["arguments"])
    engine = vllm.LLM.from_engine_args(EngineArgs.from_cli_args(arguments))
    found = {
        "version": vllm.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "layers": engine.apply_model(describe_layers)[0],
        "replies": reply(engine, wanted["prompts"], wanted["stop_ids"], wanted["max_tokens"]),
    }
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
