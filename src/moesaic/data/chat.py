"""A checkpoint's tokenizer and the chat template that comes with it."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moesaic.core.errors import ArtifactError

PROMPT_DATE = date(2025, 8, 5)
"""What gpt-oss's chat template prints as today's date, so that a prompt is the same tokens on every day."""


class TemplateError(ArtifactError):
    """A chat template cannot render a conversation."""


def load_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """Read ``tokenizer.json``; no code that comes with a checkpoint is run.

    Raises:
        ArtifactError: if the checkpoint has no tokenizer that can be read, or the tokenizer no chat template.
    """
    if not (model / "tokenizer.json").is_file():
        raise ArtifactError(f"{model} has no tokenizer.json; copy the tokenizer's files beside the weights")
    try:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model)
    except Exception as broken:  # of files that are damaged, which raises errors of many kinds
        raise ArtifactError(f"the tokenizer of {model} cannot be read: {broken}; copy its files again") from broken
    if not tokenizer.chat_template:
        raise ArtifactError(f"{model} has no chat template; add its chat_template.jinja to the checkpoint")
    return tokenizer


def render_conversation(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, effort: str
) -> list[int]:
    """Token ids of ``{"role", "content"}`` messages in the chat template, up to where the model's reply begins.

    Raises:
        TemplateError: if the template refuses them.
    """
    try:
        ids = tokenizer.apply_chat_template(
            list(messages),
            reasoning_effort=effort,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            strftime_now=PROMPT_DATE.strftime,
        )
    except Exception as refused:  # the template is the user's program and may raise anything
        raise TemplateError(f"the chat template refuses {messages!r:.200}: {refused}") from refused
    return [int(token) for token in ids]
