"""The OpenAPI description. Bodies are read by hand, within limits, so their schemas are put in by hand as well."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moesaic.deploy.server.protocol import ChatRequest, CompletionRequest

_REQUESTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}
_REFUSALS = {
    "400": "A parameter cannot be used, or the request exceeds a limit",
    "404": "There is no such model",
    "413": "The body is too large",
    "415": "The body is not announced as JSON",
    "429": "The queue is full",
    "503": "The server is stopping",
}
_REFERENCE = "#/components/schemas/{model}"


def describe(app: FastAPI, model: str) -> None:
    """Make ``/openapi.json`` complete."""
    app.openapi = lambda: _schema(app, model)  # type: ignore[method-assign]


def _schema(app: FastAPI, model: str) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        kinds = [(kind, "validation") for kind in _REQUESTS.values()]
        _, definitions = models_json_schema(kinds, ref_template=_REFERENCE)  # type: ignore[arg-type]
        schemas = definitions["$defs"] | {"Error": _error()}
        for kind in _REQUESTS.values():
            schemas[kind.__name__]["properties"]["model"]["enum"] = [model]
        schema["components"] = {"schemas": schemas}
        for path, kind in _REQUESTS.items():
            schema["paths"][path]["post"].update(_operation(kind))
        schema["paths"]["/v1/models/{model}"]["get"]["responses"]["404"] = _refusal(_REFUSALS["404"])
        schema["paths"]["/health"]["get"]["responses"]["503"] = _refusal(_REFUSALS["503"])
        schema["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {
            "text/plain": {"schema": {"type": "string"}}
        }
        app.openapi_schema = schema
    return app.openapi_schema


def _operation(kind: type[BaseModel]) -> dict[str, Any]:
    body = {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}
    reply = {
        "description": "The reply, or a stream of its chunks",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {},
        },
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": reply} | {status: _refusal(why) for status, why in _REFUSALS.items()},
    }


def _refusal(why: str) -> dict[str, Any]:
    return {
        "description": why,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Error")}}},
    }


def _error() -> dict[str, Any]:
    text, maybe = {"type": "string"}, {"type": ["string", "null"]}
    inner = {
        "type": "object",
        "properties": {"message": text, "type": text, "param": maybe, "code": maybe},
        "required": ["message", "type", "param", "code"],
    }
    return {"type": "object", "properties": {"error": inner}, "required": ["error"]}
