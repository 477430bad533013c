"""The model that the server serves, with its tokenizer. It turns requests into replies to generate."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moesaic.data.chat import render_conversation
from moesaic.deploy.server.batching import Reply
from moesaic.deploy.server.harmony import ChatWriter
from moesaic.deploy.server.limits import ServerLimits
from moesaic.deploy.server.protocol import ChatRequest, CompletionRequest, RequestError
from moesaic.deploy.server.replies import Decode, PlainWriter, Writer
from moesaic.deploy.server.sampling import SamplingParams
from moesaic.deploy.server.thinking import ThinkingWriter, ThinkTags

_COMPLETION_TOKENS = 16
"""The API's default for plain completions; a chat reply may use the whole context."""
_CHARACTERS_PER_TOKEN = 64
"""A text with more of them for each token of the context is refused before it is tokenized."""


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, the tokens and limits it is served with."""

    name: str
    created: int
    """Seconds since 1970."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    markers: dict[int, str]
    think_tags: ThinkTags | None
    """Of a model without channels."""
    stop_ids: frozenset[int]
    limits: ServerLimits

    def chat_replies(self, asked: ChatRequest) -> list[Reply]:
        """One reply for each of ``n``.

        Raises:
            RequestError: if the template refuses the messages, or the request exceeds a limit.
        """
        self.check_name(asked.model)
        given = asked.max_completion_tokens
        if given is not None and asked.max_tokens not in (None, given):
            raise RequestError(400, "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        prompt = self._render(asked)
        rest = self.limits.max_context - len(prompt)
        samplings = self._sampling(asked, [prompt], given or asked.max_tokens or max(1, rest), "messages")
        return [Reply(prompt, sampling, self._chat_writer(prompt, asked.stops)) for prompt, sampling in samplings]

    def completion_replies(self, asked: CompletionRequest) -> list[Reply]:
        """``n`` replies for each prompt, in the order of the prompts.

        Raises:
            RequestError: if a prompt is empty, names unknown tokens, or the request exceeds a limit.
        """
        self.check_name(asked.model)
        prompts = [self._encode(prompt) for prompt in asked.prompts]
        samplings = self._sampling(asked, prompts, asked.max_tokens or _COMPLETION_TOKENS, "prompt")
        decode = self._decoder(asked.skip_special_tokens is not False)
        return [Reply(prompt, sampling, PlainWriter(decode, asked.stops)) for prompt, sampling in samplings]

    @property
    def entry(self) -> dict[str, Any]:
        """The model in the API's list of models."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "moesaic"}
        return entry | {"max_model_len": self.limits.max_context}

    def check_name(self, name: str) -> None:
        """Raise RequestError, 404, for the name of another model."""
        if name != self.name:
            raise RequestError(
                404, f"there is no model {name[:100]!r} here, only {self.name!r}", "model", "model_not_found"
            )

    def _chat_writer(self, prompt: Sequence[int], stops: Sequence[str]) -> Writer:
        decode = self._decoder(skip_special_tokens=False)
        if self.think_tags is None:
            return ChatWriter(decode, self.markers, stops)
        begins_thinking = self.think_tags.is_open(prompt, decode)
        return ThinkingWriter(decode, self.think_tags, self.markers, stops, begins_thinking)

    def _render(self, asked: ChatRequest) -> list[int]:
        has_channels = self.think_tags is None
        instructs, thought = ("developer", "thinking") if has_channels else ("system", "reasoning_content")
        messages = [
            {
                "role": instructs if message.role in ("system", "developer") else message.role,
                "content": message.text,
                **({thought: message.analysis} if message.analysis else {}),
            }
            for message in asked.messages
        ]
        self._check_size(sum(len(text) for message in messages for text in message.values()), "messages")
        try:
            return render_conversation(messages, self.tokenizer, asked.effort)
        except (jinja2.TemplateError, TypeError, ValueError) as refusal:
            raise RequestError(400, f"messages: the chat template refuses them: {refusal}", "messages") from refusal

    def _encode(self, prompt: str | list[int]) -> list[int]:
        self._check_size(len(prompt), "prompt")
        if isinstance(prompt, str):
            prompt = [int(token) for token in self.tokenizer(prompt).input_ids]
            if not prompt:
                raise RequestError(400, "prompt: there is no token in it", "prompt")
        vocabulary = self.model.config.vocab_size
        if max(prompt) >= vocabulary:
            raise RequestError(400, f"prompt: there is no token {max(prompt)}; ids end at {vocabulary - 1}", "prompt")
        return prompt

    def _check_size(self, size: int, param: str) -> None:
        if size > self.limits.max_context * _CHARACTERS_PER_TOKEN:
            raise self._too_long(f"{size} characters or ids", param)

    def _too_long(self, what: str, param: str) -> RequestError:
        message = f"{what} do not fit the context of {self.limits.max_context} tokens"
        return RequestError(400, message, param, "context_length_exceeded")

    def _sampling(
        self, asked: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], max_tokens: int, param: str
    ) -> list[tuple[list[int], SamplingParams]]:
        """Every reply's prompt and sampling parameters, after all limits have been checked."""
        count = (asked.n or 1) * len(prompts)
        if count > self.limits.max_choices:
            raise RequestError(400, f"{count} replies are asked for; {self.limits.max_choices} is the most", "n")
        longest = max(len(prompt) for prompt in prompts)
        if longest + max_tokens > self.limits.max_context:
            raise self._too_long(f"a prompt of {longest} tokens and a reply of up to {max_tokens}", param)
        min_tokens = asked.min_tokens or 0
        if min_tokens > max_tokens:
            raise RequestError(400, f"min_tokens {min_tokens} is more than max_tokens {max_tokens}", "min_tokens")
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return [
            (
                prompt,
                SamplingParams(
                    max_tokens=max_tokens,
                    min_tokens=min_tokens,
                    temperature=1.0 if asked.temperature is None else asked.temperature,
                    top_p=1.0 if asked.top_p is None else asked.top_p,
                    seed=f"{seed}/{choice}",
                    stop_ids=frozenset() if asked.ignore_eos else self.stop_ids,
                ),
            )
            for prompt in prompts
            for choice in range(asked.n or 1)
        ]

    def _decoder(self, skip_special_tokens: bool) -> Decode:
        return lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
