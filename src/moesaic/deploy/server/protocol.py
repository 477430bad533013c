"""What a client may ask for: the OpenAI API's requests, as far as they are served here.

Parameters of the API that are not served are accepted at the value that means nothing, and refused at any other, so
that no client believes in something that is not done. Unknown names are refused, unless they are null. What the server
replied is accepted as history.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

_LARGEST_SEED = 2**63 - 1
_NAME = re.compile(r"(?!str$|int$)\w+")

Effort = Literal["low", "medium", "high"]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1)]
Text = Annotated[str, Field(min_length=1)]


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 32.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_false(value: bool) -> bool:
    if value:
        raise ValueError("only false is served")
    return value


def _is_empty(value: list[Any]) -> list[Any]:
    if value:
        raise ValueError("it is not served here; leave it out, or give an empty list")
    return value


def _only_text(content: Any) -> Any:
    """Refuse parts of other kinds by name, before each of their keys is."""
    for place, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"part {place} is of type {kind[:50]!r}; this model reads text alone, as type 'text'")
    return content


Whole = BeforeValidator(_whole)
Nothing = Annotated[list[Any], AfterValidator(_is_empty), WithJsonSchema({"type": "array", "maxItems": 0})]
No = Annotated[bool, AfterValidator(_is_false), WithJsonSchema({"type": "boolean", "const": False})]


class RequestError(Exception):
    """A request that is refused, as the OpenAI API words it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the reply."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Clients send what is not set as null."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name in cls.model_fields}


class StreamOptions(_Part):
    """How a stream is to be sent."""

    include_usage: bool | None = None
    """Send a last chunk with the token counts."""
    include_obfuscation: No | None = None


class TextPart(_Part):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str
    annotations: Nothing | None = None


class Message(_Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    """Of models with channels ``system`` is read as ``developer``: gpt-oss's own system message holds the reasoning
    effort. Of all others ``developer`` is read as ``system``."""
    content: Annotated[
        str | Annotated[list[TextPart], Field(fail_fast=True)] | None,
        BeforeValidator(_only_text),
        Field(validate_default=True),
    ] = None
    """Only an assistant's may be null: its reply was cut off before the answer."""
    reasoning_content: str | None = None
    """Of an assistant: its analysis, which the chat template may leave out; ``reasoning`` and ``thinking`` mean the
    same."""
    reasoning: str | None = None
    thinking: str | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None

    @field_validator("content", mode="after")
    @classmethod
    def _is_there(cls, content: Any, message: ValidationInfo) -> Any:
        if content is None and message.data.get("role") != "assistant":
            raise ValueError("it must be a text or a list of text parts")
        return content

    @model_validator(mode="after")
    def _thinks_once(self) -> Self:
        thoughts = {self.reasoning_content, self.reasoning, self.thinking} - {None, ""}
        if len(thoughts) > 1:
            raise ValueError("reasoning_content, reasoning and thinking are the same thing, but differ; keep one")
        if thoughts and self.role != "assistant":
            raise ValueError("only an assistant has reasoning")
        return self

    @property
    def text(self) -> str:
        """The content without its parts."""
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""

    @property
    def analysis(self) -> str | None:
        """The reasoning from whichever place."""
        return self.reasoning_content or self.reasoning or self.thinking


class TemplateOptions(_Part):
    """Arguments of the chat template."""

    reasoning_effort: Effort | None = None


class TextFormat(_Part):
    """The only format of a reply."""

    type: Literal["text"]


class _Generation(_Part):
    """What both endpoints take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    """Tokens of the reply, reasoning included."""
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    """The reply does not end before as many."""
    ignore_eos: bool | None = None
    """Go on to ``max_tokens`` whatever the model says; for benchmarks."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 takes the most likely token; 1 if not given."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_LARGEST_SEED - 1, le=_LARGEST_SEED), Whole] | None = None
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=16)] | None = None
    n: Annotated[int, Field(ge=1), Whole] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=0), Whole] | None = None
    min_p: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """All stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(_Generation):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), Whole] | None = None
    """The newer name of ``max_tokens``."""
    reasoning_effort: Effort | None = None
    """How much to reason; medium if not given."""
    chat_template_kwargs: TemplateOptions | None = None
    """Another place for the effort."""

    logprobs: No | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), Whole] | None = None
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, Any] | None = None
    store: No | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    prediction: None = None
    audio: None = None
    web_search_options: None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def effort(self) -> Effort:
        """The effort from either place."""
        named = self.chat_template_kwargs.reasoning_effort if self.chat_template_kwargs else None
        return self.reasoning_effort or named or "medium"


class CompletionRequest(_Generation):
    """``POST /v1/completions``."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(fail_fast=True, min_length=1)]
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)]
    )
    """A prompt or several, as text or as token ids."""
    skip_special_tokens: bool | None = None
    """Leave markers out of the text; true if not given."""
    return_token_ids: bool | None = None
    """Name the generated tokens as well, as ``token_ids`` of every choice; not in a stream."""

    logprobs: None = None
    echo: No | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), Whole] | None = None

    @model_validator(mode="after")
    def _whole_if_token_ids(self) -> Self:
        if self.stream and self.return_token_ids:
            raise ValueError("return_token_ids is not served in a stream")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[return-value]


Body = TypeVar("Body", ChatRequest, CompletionRequest)


def parse(kind: type[Body], body: bytes) -> Body:
    """Read a request.

    Raises:
        RequestError: 400, naming the first parameter that cannot be used.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_input=False, include_context=False)
    first, place = errors[0], _place(errors[0]["loc"])
    if first["type"] == "json_invalid":
        raise RequestError(400, f"the body is not JSON: {first['msg']}")
    if first["type"] == "extra_forbidden":
        raise RequestError(400, f"there is no parameter {place!r} here", place, "unknown_parameter")
    reasons = dict.fromkeys(error["msg"] for error in errors if _place(error["loc"]) == place)
    raise RequestError(400, f"{place or 'the body'}: {'; or '.join(reasons)}", place or None)


def _place(location: Iterable[str | int]) -> str:
    """``messages.0.content``: without the names of the types that a value could have had."""
    steps = [str(step) for step in location if isinstance(step, int) or _NAME.fullmatch(step)]
    return ".".join(steps)[:200]
