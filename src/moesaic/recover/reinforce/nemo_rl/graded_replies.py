"""Rewards of a step's replies, and their figures for the training curve. It imports neither Ray nor NeMo-RL.

NeMo-RL gives an environment the text of a reply and nothing else. So the driver keeps channel markers and stop tokens
in that text, and guards what the model only spelled (``keep_markers``). Two inputs of the reward are read back from it.
A reply is truncated if it does not end in a stop token. Its length is the number of tokens of its text, encoded again:
this differs from the number generated where the model did not split a text as the tokenizer does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from moesaic.core.training_curve import append_row
from moesaic.data.chat import decode_reply, encode_reply, load_tokenizer
from moesaic.recover.reinforce.nemo_rl.processor import problem_of
from moesaic.recover.reinforce.rewards import GradedReply, grade_reply
from moesaic.recover.reinforce.stage import RewardConfig

Conversation = Sequence[Mapping[str, Any]]


class Grader:
    """Grades replies by the rows they answer, and writes one line of the curve per step."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Settings are what ``config`` renders for the environment."""
        self._tokenizer = load_tokenizer(Path(settings["tokenizer"]))
        self._stops = tuple(self._tokenizer.decode([token]) for token in settings["stop_ids"])
        self._rewards = RewardConfig.model_validate(settings["rewards"])
        self._curve = Path(settings["curve"])
        self._step: int = settings["first_step"]

    def step(self, conversations: Sequence[Conversation], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The rewards of one step's replies."""
        replies = [
            self.grade(_reply_text(conversation), row) for conversation, row in zip(conversations, rows, strict=True)
        ]
        self._step += 1
        append_row(self._curve, {"step": self._step} | _mean_figures(replies, [row["effort"] for row in rows]))
        return [reply.reward.total for reply in replies]

    def grade(self, text: str, row: Mapping[str, Any]) -> GradedReply:
        """Grade one reply."""
        num_tokens = len(encode_reply(text, self._tokenizer))
        truncated = not text.endswith(self._stops)
        correct = problem_of(row).is_solved_by_reply(text, truncated)
        return grade_reply(text, num_tokens, truncated, correct, row["reference_tokens"], self._rewards)


def _reply_text(conversation: Conversation) -> str:
    return "".join(message["content"] for message in conversation if message["role"] == "assistant")


def _mean_figures(replies: Sequence[GradedReply], efforts: Sequence[str]) -> dict[str, float]:
    """The mean reward of a step, and every figure's mean per effort."""
    means = {"reward": fmean(reply.reward.total for reply in replies)}
    for effort in sorted(set(efforts)):
        figures = [reply.figures for reply, asked in zip(replies, efforts, strict=True) if asked == effort]
        means |= {f"{name}_{effort}": fmean(row[name] for row in figures) for name in figures[0]}
    return means


def keep_markers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Make a tokenizer decode as :func:`decode_reply` whatever it is asked: NeMo-RL would leave markers out."""

    def batch_decode(sequences: Any, **_: Any) -> list[str]:
        return [decode_reply([*map(int, sequence)], tokenizer) for sequence in sequences]

    tokenizer.batch_decode = batch_decode
    return tokenizer
