"""Runs in vLLM's environment: a model made of dummies gets a trainer's weights in parts, and replies.

``python refit_program.py MODEL WEIGHTS PROMPTS`` prints the replies' token ids as JSON on the last line. Weights come
before vLLM rearranges them for its kernels: on CPUs it cannot take them afterwards, as it does on GPUs.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
_PART = 7
_TOKENS = 16


def main(model: str, weights: str, prompts: str) -> None:
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    from vllm.model_executor.model_loader import base_loader

    rearrange = base_loader.process_weights_after_loading

    def refit(made: Any, *rest: Any) -> None:
        sent = list(load_file(weights).items())
        for start in range(0, len(sent), _PART):
            made.load_weights(iter(sent[start : start + _PART]))
        rearrange(made, *rest)

    base_loader.process_weights_after_loading = refit
    engine = LLM(
        model=model,
        load_format="dummy",
        hf_overrides={"quantization_config": {}},
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=256,
        skip_tokenizer_init=True,
    )
    asked = [{"prompt_token_ids": prompt} for prompt in json.loads(Path(prompts).read_text())]
    replies = engine.generate(asked, SamplingParams(temperature=0, max_tokens=_TOKENS, detokenize=False))
    print("\n" + json.dumps([list(reply.outputs[0].token_ids) for reply in replies]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
