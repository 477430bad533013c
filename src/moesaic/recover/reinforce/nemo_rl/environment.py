"""What the replies of one step earn, and their figures for the training curve; no Ray and no NeMo-RL in it.

NeMo-RL gives an environment the text of a reply and nothing else. So the driver keeps channel markers and stop tokens
in that text (``keep_markers``), and two things that ``moesaic.recover.reinforce.rewards`` needs are read back from it:
a reply is truncated if it does not end in a stop token, and its length is counted by encoding it again. Where a model
chose another spelling of a text than the tokenizer would, that count is not quite the number of tokens it drew.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from moesaic.core.training_curve import append_row
from moesaic.data.chat import load_tokenizer
from moesaic.data.verifiers import split_reply
from moesaic.recover.reinforce.nemo_rl.processor import problem_of
from moesaic.recover.reinforce.rewards import Reward, reward_reply
from moesaic.recover.reinforce.stage import RewardConfig

Conversation = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Judged:
    """One reply's reward and what the curve says about it."""

    reward: Reward
    effort: str
    correct: bool
    num_tokens: int
    truncated: bool

    @property
    def figures(self) -> dict[str, float]:
        """Named as ``training.jsonl`` names their means."""
        return {
            "reward": self.reward.total,
            "reward_correct": self.reward.correct,
            "reward_format": self.reward.format,
            "reward_length": self.reward.length,
            "accuracy": float(self.correct),
            "tokens_per_request": float(self.num_tokens),
            "truncated": float(self.truncated),
        }


class Judge:
    """Judges replies by the rows they answer, and writes one line of the curve per step."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Read the settings that ``config`` renders for the environment."""
        self._tokenizer = load_tokenizer(Path(settings["tokenizer"]))
        self._stops = tuple(self._tokenizer.decode([token]) for token in settings["stop_ids"])
        self._rewards = RewardConfig.model_validate(settings["rewards"])
        self._curve = Path(settings["curve"])
        self._step: int = settings["first_step"]

    def step(self, conversations: Sequence[Conversation], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The rewards of one step's replies."""
        judged = [
            self.judge(reply_of(conversation), row) for conversation, row in zip(conversations, rows, strict=True)
        ]
        self._step += 1
        append_row(self._curve, {"step": self._step} | mean_figures(judged))
        return [reply.reward.total for reply in judged]

    def judge(self, text: str, row: Mapping[str, Any]) -> Judged:
        """One reply's reward."""
        num_tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        truncated = not text.endswith(self._stops)
        problem = problem_of(row)
        is_correct = functools.cache(problem.is_solved_by)
        reward = reward_reply(text, num_tokens, truncated, is_correct, row["reference_tokens"], self._rewards)
        correct = not truncated and is_correct(split_reply(text).final)
        return Judged(reward, row["effort"], correct, num_tokens, truncated)


def reply_of(conversation: Conversation) -> str:
    """The text after the prompt."""
    return "".join(message["content"] for message in conversation if message["role"] == "assistant")


def mean_figures(judged: Sequence[Judged]) -> dict[str, float]:
    """The mean reward of a step, and every figure's mean per effort."""
    means = {"reward": fmean(reply.reward.total for reply in judged)}
    for effort in sorted({reply.effort for reply in judged}):
        replies = [reply.figures for reply in judged if reply.effort == effort]
        means |= {f"{name}_{effort}": fmean(figures[name] for figures in replies) for name in replies[0]}
    return means


def keep_markers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a tokenizer keep special tokens whatever it is asked: NeMo-RL decodes rollouts without them."""
    decode = tokenizer.batch_decode

    def batch_decode(sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        texts: list[str] = decode(sequences, skip_special_tokens=False, **options)
        return texts

    tokenizer.batch_decode = batch_decode
    return tokenizer
