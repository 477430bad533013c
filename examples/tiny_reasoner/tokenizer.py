"""The word-level tokenizer, the gpt-oss style chat template, and the same rendering in plain Python for training.

Every assistant message ends in `<|return|>`, earlier ones too, and keeps its analysis: what the model reads back in a
later turn is what it wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.tiny_reasoner.suite import Effort, Problem
from examples.tiny_reasoner.trace import Kind, Trace
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
    """Token ids, and the kind of each that the assistant wrote; None where it did not."""

    ids: tuple[int, ...]
    kinds: tuple[Kind | None, ...]

    def __add__(self, other: "Rendered") -> "Rendered":
        return Rendered(self.ids + other.ids, self.kinds + other.kinds)


def encode(text: str, kind: Kind | None) -> Rendered:
    """Words to ids."""
    ids = tuple(IDS[word] for word in text.split())
    return Rendered(ids, (kind,) * len(ids))


def render_system(effort: Effort) -> Rendered:
    """The system message that sets the effort."""
    return encode(f"<|start|> system <|message|> Reasoning: {effort} <|end|>", None)


def render_question(content: str) -> Rendered:
    """A user message and the start of the answer: what a generation begins from."""
    return encode(f"<|start|> user <|message|> {content} <|end|> <|start|> assistant", None)


def render_answer(answer: str, trace: Trace) -> Rendered:
    """What the assistant writes after `<|start|>assistant`."""
    final = encode(f"<|channel|> final <|message|> {answer} <|return|>", "sure")
    if not trace.words:
        return final
    analysis = Rendered(tuple(IDS[word] for word, _ in trace.words), tuple(kind for _, kind in trace.words))
    opening = encode("<|channel|> analysis <|message|>", "sure")
    return opening + analysis + encode("<|end|> <|start|> assistant", "sure") + final


def render_turns(turns: Sequence[tuple[Problem, Trace]], effort: Effort) -> Rendered:
    """A whole conversation at one effort."""
    rendered = render_system(effort)
    for problem, trace in turns:
        rendered += render_question(problem.question) + render_answer(problem.answer, trace)
    return rendered
