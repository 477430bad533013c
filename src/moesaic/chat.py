"""A checkpoint's tokenizer and the chat template that comes with it."""

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moesaic.errors import ArtifactError


def load_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """Read ``tokenizer.json``; no code that comes with a checkpoint is run.

    Raises:
        ArtifactError: if the checkpoint has no tokenizer, or the tokenizer no chat template.
    """
    if not (model / "tokenizer.json").is_file():
        raise ArtifactError(f"{model} has no tokenizer.json; copy the tokenizer's files beside the weights")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(model)
    if not tokenizer.chat_template:
        raise ArtifactError(f"{model} has no chat template; add its chat_template.jinja to the checkpoint")
    return tokenizer
