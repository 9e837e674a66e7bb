"""The OpenAPI 3.1 document, made from the same dataclasses that read the requests."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from diffship import __version__
from diffship.runtimes.serve.forms import GenerateForm, HandoffForm, ImagesForm, ResumeForm, field_schema, json_schema
from diffship.runtimes.serve.options import ServeOptions

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("code", "type", "message", "request_id")},
            "required": ["code", "type", "message", "request_id"],
        }
    },
    "required": ["error"],
}
_ERRORS = {
    "400": "not HTTP",
    "403": "Host or Origin from elsewhere",
    "408": "the body came too slowly",
    "409": "the Idempotency-Key came with another request before",
    "411": "no Content-Length",
    "413": "the body is too large",
    "415": "another Content-Type, or a compressed body",
    "422": "a value that is not legal; the message names what is",
    "431": "the headers are too large",
    "500": "the model failed on this request",
    "503": "no capacity, loading or stopping; Retry-After says when to ask again",
    "504": "not done within the deadline",
}
_BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
_OBJECT = {"schema": {"type": "object"}}
_TEXT = {"schema": {"type": "string"}}
_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a retry with the same key and content gets the same answer; nothing is drawn twice",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"},
}


def openapi_document(options: ServeOptions, token: bool) -> dict[str, Any]:
    """The document of a server with these options; `token` says whether it asks for one."""
    events = {"text/event-stream": _TEXT}
    picture = {"image/png": _BINARY, "application/json": _OBJECT, **events}
    trajectory = {"application/octet-stream": _BINARY}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "diffship", "version": __version__, "description": "Text to image, in steps that travel."},
        "paths": {
            "/live": _get("the process answers", {"text/plain": _TEXT}),
            "/ready": _get("every model takes requests", {"application/json": _OBJECT}, "503"),
            "/metrics": _get("Prometheus' text form", {"text/plain": _TEXT}),
            "/v1/models": _get("what is served", {"application/json": _OBJECT}),
            "/v1/models/{name}": _named(_get("one of them", {"application/json": _OBJECT})),
            "/v1/generate": _post("a prompt to pictures", _json_body(GenerateForm), picture),
            "/v1/handoff": _post("a prompt to a trajectory", _json_body(HandoffForm), {**trajectory, **events}),
            "/v1/resume": _post(
                "a trajectory to its picture, or further", _raw_body(options), {**trajectory, **picture}
            ),
            "/v1/images/generations": _post("OpenAI's form", _json_body(ImagesForm), {"application/json": _OBJECT}),
        },
    }
    document["paths"]["/v1/resume"]["post"]["parameters"] += _query(ResumeForm)
    if token:
        document["components"] = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
        for path, methods in document["paths"].items():
            if path not in ("/live", "/ready"):
                for entry in methods.values():
                    entry["security"] = [{"token": []}]
                    entry["responses"]["401"] = _error("no valid token")
    return document


def _get(summary: str, content: dict[str, Any], *errors: str) -> dict[str, Any]:
    responses = {"200": {"description": "ok", "content": content}}
    return {
        "get": {"summary": summary, "responses": responses | {code: _also(content) for code in errors} | _guarded()}
    }


def _named(entry: dict[str, Any]) -> dict[str, Any]:
    """With the parameter of its path, and the answer if nothing has that name."""
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    none = {"404": _error("nothing has that name")}
    return {
        method: {**about, "parameters": [name], "responses": about["responses"] | none}
        for method, about in entry.items()
    }


def _post(summary: str, body: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    responses = {"200": {"description": "ok", "content": content}}
    responses |= {code: _error(text) for code, text in _ERRORS.items()}
    return {"post": {"summary": summary, "parameters": [_KEY], "requestBody": body, "responses": responses}}


def _guarded() -> dict[str, Any]:
    return {code: _error(_ERRORS[code]) for code in ("400", "403", "411", "413", "431")}


def _also(content: dict[str, Any]) -> dict[str, Any]:
    return {"description": "not now", "content": content}


def _error(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _ERROR}}}


def _json_body(form: type[Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": json_schema(form)}}}


def _raw_body(options: ServeOptions) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary", "maxLength": options.body_bytes}
    return {"required": True, "content": {"application/octet-stream": {"schema": schema}}}


def _query(form: type[Any]) -> list[dict[str, Any]]:
    hints, made = typing.get_type_hints(form), []
    for entry in dataclasses.fields(form):
        schema = field_schema(hints[entry.name], entry)
        if isinstance(schema["type"], list):  # a query has no null; what may be null may be left out
            schema["type"] = schema["type"][0]
        made.append({"name": entry.name, "in": "query", "required": False, "schema": schema})
    return made
