"""Public data sets that are known here: where they lie on the Hugging Face hub, their licence, how their rows are read.

Nothing of them was fetched for this: what a row says was read on the set's published card, or in public code that reads
the set, as ``checked`` says. A set that has changed since is refused by its columns. A licence is what the card says;
whether it allows what you do is for you to decide. Of the large sets each part's first file is taken, unless a source
names ``files``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every set's rows in parquet as well."""


@dataclass(frozen=True)
class KnownSet:
    """A repository of the hub, and its files."""

    hub: str
    licence: str
    """As its card says."""
    layout: str
    """A name in ``layouts.LAYOUTS``."""
    parts: Mapping[str, str]
    """The pattern of the files of each part."""
    checked: Literal["card", "code"]
    """Where its columns were read: on its card, or in public code that reads it."""
    revision: str | None = None
    """The branch to take the files from; None: the main branch."""


KNOWN_SETS: dict[str, KnownSet] = {
    "nemotron_v1": KnownSet(
        "nvidia/Nemotron-Post-Training-Dataset-v1",
        "cc-by-4.0",
        "messages",
        {part: f"data/{part}-00000-of-*.parquet" for part in ("chat", "math", "code", "stem")},
        "card",
    ),
    "llama_nemotron": KnownSet(
        "nvidia/Llama-Nemotron-Post-Training-Dataset",
        "cc-by-4.0",
        "input_output",
        {part: f"SFT/{part}/*.jsonl" for part in ("chat", "science", "math", "code", "safety")},
        "code",
    ),
    "longalign": KnownSet("zai-org/LongAlign-10k", "none on its card", "messages", {"train": "long.jsonl"}, "code"),
    "dapo_math_17k": KnownSet(
        "BytedTsinghua-SIA/DAPO-Math-17k",
        "apache-2.0",
        "dapo_math_17k",
        {"train": "data/dapo-math-17k.parquet"},
        "code",
    ),
    "skywork_or1": KnownSet(
        "Skywork/Skywork-OR1-RL-Data", "none on its card", "skywork_or1", {"math": "data/math-*.parquet"}, "code"
    ),
    "deepscaler": KnownSet(
        "agentica-org/DeepScaleR-Preview-Dataset",
        "mit",
        "problem_answer",
        {"train": "default/train/*.parquet"},
        "code",
        CONVERTED,
    ),
    "gsm8k": KnownSet(
        "openai/gsm8k", "mit", "gsm8k", {part: f"main/{part}-*.parquet" for part in ("train", "test")}, "code"
    ),
    "math_500": KnownSet(
        "HuggingFaceH4/MATH-500", "none on its card", "problem_answer", {"test": "test.jsonl"}, "code"
    ),
    "aime_2024": KnownSet(
        "HuggingFaceH4/aime_2024", "none on its card", "problem_answer", {"train": "data/train-*.parquet"}, "code"
    ),
    "mmlu_pro": KnownSet("TIGER-Lab/MMLU-Pro", "mit", "options", {"test": "data/test-*.parquet"}, "card"),
    "longbench_v2": KnownSet(
        "zai-org/LongBench-v2", "apache-2.0", "choices", {"train": "default/train/*.parquet"}, "card", CONVERTED
    ),
}
"""By the name that a config gives them. The first part of a set is taken unless a source names others."""
