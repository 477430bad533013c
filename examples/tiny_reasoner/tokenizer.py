"""The word-level tokenizer, the gpt-oss style chat template, and the same rendering in plain Python for training.

Every assistant message ends in `<|return|>`, earlier ones too, and keeps its analysis: what the model reads back in a
later turn is what it wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.tiny_reasoner.tasks import Effort, Problem
from examples.tiny_reasoner.vocabulary import SPECIAL, words

CHAT_TEMPLATE = """\
{#- gpt-oss in short: the effort is the system message, analysis and final are channels of the assistant. -#}
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort | default('medium', true)) + '<|end|>' -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- if message.get('thinking') -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|return|>' -}}
{%- elif message['role'] in ('user', 'developer') -%}
{{- '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' -}}
{%- else -%}
{{- raise_exception('no role ' + message['role'] + ' here; the system message is reasoning_effort') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start|>assistant' -}}
{%- endif -%}
"""
IDS = {word: index for index, word in enumerate(words())}
PAD_ID, RETURN_ID = IDS["<|endoftext|>"], IDS["<|return|>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words split at white space; special tokens need no space around them."""
    backend = Tokenizer(models.WordLevel(IDS, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|return|>",
        bos_token="<|endoftext|>",
        unk_token="<|unknown|>",
        additional_special_tokens=[*SPECIAL[1:5]],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class Rendered:
    """Token ids, and which of them the assistant wrote (the ones that carry loss)."""

    ids: tuple[int, ...]
    written: tuple[bool, ...]

    def __add__(self, other: "Rendered") -> "Rendered":
        return Rendered(self.ids + other.ids, self.written + other.written)


def encode(text: str, written: bool) -> Rendered:
    """Words to ids."""
    ids = tuple(IDS[word] for word in text.split())
    return Rendered(ids, (written,) * len(ids))


def render_system(effort: Effort) -> Rendered:
    """The system message that sets the effort."""
    return encode(f"<|start|> system <|message|> Reasoning: {effort} <|end|>", False)


def render_question(content: str) -> Rendered:
    """A user message and the start of the answer: what a generation begins from."""
    return encode(f"<|start|> user <|message|> {content} <|end|> <|start|> assistant", False)


def render_answer(problem: Problem, effort: Effort) -> Rendered:
    """What the assistant writes after `<|start|>assistant`."""
    thinking = problem.thinking(effort)
    final = f"<|channel|> final <|message|> {problem.answer} <|return|>"
    if not thinking:
        return encode(final, True)
    return encode(f"<|channel|> analysis <|message|> {thinking} <|end|> <|start|> assistant {final}", True)


def render_turns(problems: Sequence[Problem], effort: Effort) -> Rendered:
    """A whole conversation at one effort."""
    rendered = render_system(effort)
    for problem in problems:
        rendered += render_question(problem.question) + render_answer(problem, effort)
    return rendered
