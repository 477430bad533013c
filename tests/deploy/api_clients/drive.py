"""Runs in the clients' own environment: what each of them makes of a server, as one JSON object on standard output."""

import asyncio
import json
import sys
from typing import Any

import litellm
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as CompletionsOfLangChain
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

ASKED = {"role": "user", "content": "w3 w1 w4"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}


def with_openai(url: str) -> dict[str, Any]:
    """The official client: models, chat whole and streamed, its own objects as history, completions, refusals."""
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    chat, refused = client.chat.completions, {}
    first = chat.create(model="tiny", messages=[ASKED], max_completion_tokens=30, temperature=0)
    message = first.choices[0].message
    histories = (message, message.model_dump(), message.model_dump(exclude_none=True), message.to_dict())
    again = [chat.create(model="tiny", messages=[ASKED, one, ASKED], max_tokens=4, temperature=0) for one in histories]
    stream = chat.create(
        model="tiny",
        messages=[ASKED],
        max_tokens=30,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    with client.chat.completions.stream(
        model="tiny", messages=[ASKED], max_completion_tokens=30, temperature=0
    ) as held:
        gathered = [event.snapshot for event in held if event.type == "chunk"][-1]
    for name, error, call in (
        ("model", NotFoundError, lambda: client.models.retrieve("other")),
        ("image", BadRequestError, lambda: chat.create(model="tiny", messages=[{"role": "user", "content": [IMAGE]}])),
    ):
        try:
            call()
        except error as refusal:
            refused[name] = refusal.body["message"]
    return {
        "models": [model.id for model in client.models.list()],
        "retrieved": client.models.retrieve("tiny").id,
        "content": message.content,
        "reasoning": message.reasoning_content,
        "again": sorted({one.usage.prompt_tokens for one in again}),
        "streamed": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
        "usage": [first.usage.total_tokens, chunks[-1].usage.total_tokens],
        "gathered": gathered.choices[0].message.role,
        "text": client.completions.create(model="tiny", prompt="w1 w2", max_tokens=4, temperature=0).choices[0].text,
        "async": asyncio.run(_async(url)),
        "refused": refused,
    }


async def _async(url: str) -> list[int]:
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        calls = [client.chat.completions.create(model="tiny", messages=[ASKED], max_tokens=n) for n in (1, 2)]
        return [reply.usage.prompt_tokens for reply in await asyncio.gather(*calls)]


def with_langchain(url: str) -> dict[str, Any]:
    """LangChain: messages of its own classes, streamed, in a batch, and its replies as history."""
    model = ChatOpenAI(base_url=url, api_key="none", model="tiny", temperature=0, max_tokens=30)
    asked = [SystemMessage("w2"), HumanMessage("w3 w1 w4")]
    first = model.invoke(asked)
    again = model.invoke([*asked, first, HumanMessage([{"type": "text", "text": "w1"}])])
    streamed = [chunk.usage_metadata for chunk in model.stream(asked, stream_usage=True)]
    plain = CompletionsOfLangChain(base_url=url, api_key="none", model="tiny", temperature=0, max_tokens=4)
    return {
        "usage": first.usage_metadata["total_tokens"],
        "again": again.usage_metadata["input_tokens"],
        "streamed": max(usage["total_tokens"] for usage in streamed if usage),
        "batch": len(model.batch([asked, asked])),
        "text": plain.invoke("w1 w2"),
    }


def with_litellm(url: str) -> dict[str, Any]:
    """LiteLLM: chat whole and streamed, its replies as history, completions."""
    here: dict[str, Any] = {"model": "openai/tiny", "api_base": url, "api_key": "none", "temperature": 0}
    first = litellm.completion(messages=[ASKED], max_tokens=30, **here)
    message = first.choices[0].message
    again = [
        litellm.completion(messages=[ASKED, one, ASKED], max_tokens=4, **here)
        for one in (message, message.model_dump(), message.model_dump(exclude_none=True))
    ]
    stream = litellm.completion(messages=[ASKED], max_tokens=30, stream=True, **here)
    text = litellm.text_completion(**(here | {"model": "text-completion-openai/tiny"}), prompt="w1 w2", max_tokens=4)
    return {
        "reasoning": message.reasoning_content,
        "usage": first.usage.total_tokens,
        "again": sorted({one.usage.prompt_tokens for one in again}),
        "streamed": "".join(getattr(one.choices[0].delta, "reasoning_content", None) or "" for one in stream),
        "text": text.choices[0].text,
    }


if __name__ == "__main__":
    address = sys.argv[1]
    print(
        json.dumps(
            {"openai": with_openai(address), "langchain": with_langchain(address), "litellm": with_litellm(address)}
        )
    )
