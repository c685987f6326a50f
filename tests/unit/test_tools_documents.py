"""``--json`` and the schema that describes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from seen_support import check_golden, hostile, huge_gpus, stale, unreadable, with_gpus

from shmcache_tools.stat.documents import JSON_SCHEMA, json_document, json_schema

_CHANGED = """
The schema of --json changed. New fields are fine; where one changed its meaning or went away raise JSON_SCHEMA in
documents.py."""


def _closed(schema: Any) -> Any:
    """The schema, but nothing may be there that it does not tell."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    return {**closed, "additionalProperties": False} if "properties" in schema else closed


def _document() -> Any:
    """As a reader gets it, with every kind of arena."""
    infos = [with_gpus(), huge_gpus(), hostile(), stale("left"), unreadable("bad", "why")]
    return json.loads(json.dumps(json_document(infos), allow_nan=False))


def test_golden_document() -> None:
    text = json.dumps(json_document([with_gpus(), unreadable("bad", "why")]), indent=2)
    check_golden("document.json", f"{text}\n")


def test_golden_schema() -> None:
    text = json.dumps(json_schema(), indent=2)
    try:
        check_golden("schema.json", f"{text}\n")
    except AssertionError as error:
        raise AssertionError(f"{error}{_CHANGED}") from None


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert json_schema()["properties"]["schema"]["const"] == JSON_SCHEMA == 1


def test_the_schema_tells_all_that_a_document_has() -> None:
    jsonschema.Draft202012Validator(_closed(json_schema())).validate(_document())


def test_a_later_document_may_have_more() -> None:
    document = _document()
    document["arenas"][0]["stats"]["invented"] = 1
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(_closed(json_schema())).validate(document)


def _without_hit_rate(info: Any) -> None:
    del info["stats"]["hit_rate"]


def _text_for_a_number(info: Any) -> None:
    info["lanes"][0]["pid"] = "4000"


def _none_for_a_number(info: Any) -> None:
    info["lanes"][0]["pid"] = None


def _no_hex(info: Any) -> None:
    info["objects"][0]["key"] = "xyz"


def _fraction_of_a_bucket(info: Any) -> None:
    info["stats"]["histograms"]["l2_load"]["buckets"][0] = 0.5


def _no_counter(info: Any) -> None:
    del info["lanes"][1]["counters"]["l2_damaged"]


def _no_region_of_an_object(info: Any) -> None:
    del info["objects"][0]["region"]


def _a_text_for_who_has_it_open(info: Any) -> None:
    info["regions"][0]["opened"] = "2-4"


@pytest.mark.parametrize(
    "spoil",
    [
        _without_hit_rate,
        _text_for_a_number,
        _none_for_a_number,
        _no_hex,
        _fraction_of_a_bucket,
        _no_counter,
        _no_region_of_an_object,
        _a_text_for_who_has_it_open,
    ],
)
def test_the_schema_finds_what_is_wrong(spoil: Callable[[Any], None]) -> None:
    document = _document()
    spoil(document["arenas"][0])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(json_schema()).validate(document)


def test_what_each_field_says_comes_from_the_dataclasses() -> None:
    definitions = json_schema()["$defs"]
    assert definitions["Stats"]["properties"]["used_bytes"]["description"].startswith("payload bytes in blocks")
    assert definitions["LaneInfo"]["properties"]["rank"] == {
        "anyOf": [{"type": "integer"}, {"type": "null"}],
        "description": "None for a controller",
    }
    assert definitions["ArenaInfo"]["properties"]["stale"]["type"] == "boolean"
    assert "what ``shmcache-cleanup --stale`` removes" in definitions["ArenaInfo"]["properties"]["stale"]["description"]


def test_keys_are_in_hex_and_texts_as_they_are() -> None:
    document = _document()
    assert document["arenas"][0]["objects"][0]["key"] == b"prompt-000".hex()
    assert document["arenas"][0]["shares"][0]["key"] == b"prompt-000".hex()
    assert "\x1b" in document["arenas"][2]["lanes"][0]["command"]
    assert document["arenas"][3]["objects"] is None


def test_regions_are_told_by_number() -> None:
    found = _document()["arenas"][0]
    assert [region["number"] for region in found["regions"]] == [1, 2, 3, 4]
    assert found["regions"][0]["opened"] == [2, 3, 4]
    assert found["region_limit"] == 8
    assert {each["region"] for each in found["objects"]} == {0, 1, 2, 4, 7}
    assert {share["region"] for share in found["shares"]} == {0, 1, 2, 4}
    assert _document()["arenas"][3]["regions"] == []


def test_a_property_of_null_is_told_as_such() -> None:
    stats = json_schema()["$defs"]["Stats"]["properties"]
    assert stats["hit_rate"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
