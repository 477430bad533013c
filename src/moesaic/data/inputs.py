"""What a run starts from, as the checks of its stages see it before anything begins.

A stage's ``needs.py`` may have ``check_inputs(config, inputs)``: it raises what the stage itself would raise once its
turn came, which may be hours later.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from moesaic.data.chat import load_tokenizer
from moesaic.data.problems import Problem, read_problems, render_prompt
from moesaic.data.sets import DataSets
from moesaic.models.checkpoint import Checkpoint
from moesaic.models.generation import check_lengths


@dataclass(frozen=True)
class Inputs:
    """The parent and the data sets of a run."""

    parent: Checkpoint
    data: DataSets
    max_seq_len: int
    """Tokens of the longest request, prompt and reply, that the run's bundles serve."""

    @cached_property
    def prompts(self) -> list[Problem]:
        """The problems to learn from."""
        return read_problems(self.data.prompts)

    @cached_property
    def tests(self) -> list[Problem]:
        """The problems to evaluate on."""
        return read_problems(self.data.tests)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The parent's, which its children have too."""
        return load_tokenizer(self.parent.directory)

    def check_lengths(
        self, problems: Iterable[Problem], efforts: Sequence[str], max_new_tokens: int, positions: int | None = None
    ) -> None:
        """Refuse problems whose prompts, with their replies, are longer than what answers takes.

        A token is at least a byte. So only those are rendered whose bytes would not fit beside the most tokens that the
        first problem with the same roles has, template included: of many thousands, few or none.

        Args:
            problems: to be asked.
            efforts: at which they are.
            max_new_tokens: of a reply.
            positions: that there are for prompt and reply; the parent's if not given.

        Raises:
            ConfigError: that names the problem and its length.
        """
        positions = positions or self.parent.shape.max_positions
        around: dict[tuple[str, ...], int] = {}
        for problem in problems:
            roles = tuple(message.role for message in problem.prompt)
            if roles not in around:
                around[roles] = max(len(render_prompt(problem, self.tokenizer, effort)) for effort in efforts)
            written = sum(len(message.content.encode()) for message in problem.prompt)
            if around[roles] + written + max_new_tokens > positions:
                prompts = [render_prompt(problem, self.tokenizer, effort) for effort in efforts]
                check_lengths(prompts, max_new_tokens, positions, [problem.id] * len(prompts))
