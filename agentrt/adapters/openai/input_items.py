"""What a response was made from, as the items of a list that is read page by page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

from agentrt.adapters.openai import fields
from agentrt.adapters.openai.fields import Table
from agentrt.adapters.openai.refusal import Refusal

Item = Mapping[str, Any]
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
_DEFAULT_ITEMS, _MOST_ITEMS = 20, 100


def _whole(value: Any, path: str) -> Any:
    """A whole number of a query, where all is text."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else value
    return fields.whole(1, _MOST_ITEMS)(number, path)


_QUERY: Table = {
    "after": fields.text,
    "limit": _whole,
    "order": fields.one_of("asc", "desc"),
    "include": fields.only("there is nothing else to include"),
    "include[]": fields.only("there is nothing else to include"),
}


def read_query(query: str, table: Table | None = None) -> dict[str, Any]:
    """The values of a URL's query, which has no parameters but those of the table."""
    return fields.read_object(dict(parse_qsl(query, keep_blank_values=True)), "", table or {})


def shown(items: Iterable[Item]) -> tuple[Item, ...]:
    """Checked items of a body as the API tells of them: complete, and each with an id."""
    return tuple(map(_shown, items))


def _shown(item: Item) -> Item:
    kind = item["type"]
    made = {"id": f"{_PREFIXES[kind]}_{uuid4().hex}", "status": "completed", **item}
    if kind == "message" and item["role"] == "assistant":
        text = {"type": "output_text", "text": item["content"], "annotations": [], "logprobs": []}
        return {**made, "content": [text]}
    if kind == "message":
        return {**made, "content": [{"type": "input_text", "text": item["content"]}]}
    if kind == "function_call":
        return {**made, "arguments": json.dumps(item["arguments"], ensure_ascii=False)}
    return {"summary": [], **made} if kind == "reasoning" else made


def page(items: Sequence[Item], query: str) -> dict[str, Any]:
    """The part of the list that a query asks for: newest first, unless it says `order=asc`.

    Raises Refusal for what the query must not say, and an `after` that no item has as its id.
    """
    asked = read_query(query, _QUERY)
    ordered = list(items) if asked.get("order") == "asc" else list(reversed(items))
    begin = 0
    if "after" in asked:
        ids = [item["id"] for item in ordered]
        if asked["after"] not in ids:
            raise Refusal(f"no input item has the id {asked['after']!r}", "after", "invalid_value")
        begin = ids.index(asked["after"]) + 1
    end = begin + asked.get("limit", _DEFAULT_ITEMS)
    data = ordered[begin:end]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": end < len(ordered),
    }
