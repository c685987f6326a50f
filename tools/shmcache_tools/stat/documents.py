"""The JSON documents of ``shmcache-stat --json``, and the JSON Schema that tells what is in them.

The schema is made of the dataclasses in ``shmcache.stats``: their types, and the text beside each field.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Final

from shmcache.stats import ArenaInfo, Stats

#: Raised when a field of the JSON document changes its meaning or goes away; new fields may appear.
JSON_SCHEMA: Final = 1

_PLAIN: Final[dict[object, dict[str, Any]]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bytes: {"type": "string", "pattern": "^([0-9a-f]{2})*$", "description": "in hex"},
    types.NoneType: {"type": "null"},
}
#: What a document has beside the fields of a dataclass.
_PROPERTIES: Final[dict[object, tuple[str, ...]]] = {ArenaInfo: ("stale",), Stats: ("hit_rate",)}


def json_document(infos: Sequence[ArenaInfo]) -> dict[str, Any]:
    """What ``--json`` prints: always a list of arenas, also for one."""
    return {"schema": JSON_SCHEMA, "arenas": [_json_arena(info) for info in infos]}


def json_schema() -> dict[str, Any]:
    """What ``json_document`` gives, as a JSON Schema (draft 2020-12). Later versions may have more fields."""
    definitions: dict[str, Any] = {}
    arenas = {"type": "array", "items": _schema_of(ArenaInfo, definitions), "description": "by name"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "shmcache-stat --json",
        "description": "The arenas of this user, or the one that was asked for. New fields may appear; "
        "`schema` is raised when one changes its meaning or goes away.",
        "type": "object",
        "properties": {"schema": {"const": JSON_SCHEMA}, "arenas": arenas},
        "required": ["schema", "arenas"],
        "$defs": dict(sorted(definitions.items())),
    }


def _json_arena(info: ArenaInfo) -> dict[str, Any]:
    document = info.as_dict()
    if info.stats is not None:
        document["stats"]["hit_rate"] = info.stats.hit_rate
    return document


def _schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of values of that type; those of dataclasses are put into ``definitions``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return {**_schema_of(arguments[0], definitions), "description": arguments[1]}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, definitions) for argument in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _schema_of(arguments[0], definitions)}
    if is_dataclass(hint):
        name = typing.cast("type", hint).__name__
        if name not in definitions:
            definitions[name] = {}  # so that it is not begun again
            definitions[name] = _object_of(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    return dict(_PLAIN[hint])


def _object_of(cls: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    properties = {field.name: _schema_of(hints[field.name], definitions) for field in fields(cls)}
    for name in _PROPERTIES.get(cls, ()):
        get = getattr(cls, name).fget
        hint = typing.get_type_hints(get)["return"]
        properties[name] = {**_schema_of(hint, definitions), "description": inspect.getdoc(get)}
    summary = inspect.cleandoc(cls.__doc__).split("\n\n")[0].replace("\n", " ")
    return {"type": "object", "description": summary, "properties": properties, "required": list(properties)}
