"""The OpenAPI document: bodies are read and checked by ``read_body``, so it is told of them here."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REFERENCE: Final = "#/components/schemas/{model}"
_ERROR: Final = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
#: What every route may answer instead.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "A refusal in OpenAI's form.",
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model="Refusal")}}},
    }
}
_bodies: Final[list[type[BaseModel]]] = []


def body_of(kind: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route with such a body."""
    _bodies.append(kind)
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_document(app: FastAPI, *, with_keys: bool) -> None:
    """Have ``/openapi.json`` tell of everything. It is made when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, with_keys)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _document(app: FastAPI, with_keys: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, models = models_json_schema([(kind, "validation") for kind in _bodies], ref_template=_REFERENCE)
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(models["$defs"])
    schemas["Refusal"] = _ERROR
    if with_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
