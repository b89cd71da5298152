"""What a JSON schema must become so that llguidance's texts fit it, as `jsonschema` reads it.

llguidance follows most of a schema to the letter. Here is the rest: formats of dates, patterns that
engines read in different ways, keys that hide in escapes, and what older drafts mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from attrs import frozen

from agentrt.errors import GrammarInvalid
from agentrt.grammar_patterns import NO_NUL, exact_pattern, is_same_everywhere, plain_pattern

Schema = Mapping[str, Any]

# llguidance's own rules for these formats take 30 February, and leap seconds at any time of a day.
_MONTH_DAY = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = f"(?:{_YEAR}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
# These are refused, since llguidance has no rule for them; what the standard has not is a note.
_STANDARD_FORMATS = frozenset(
    [
        *("date-time", "date", "time", "duration", "email", "idn-email", "hostname"),
        *("idn-hostname", "ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid"),
        *("uri-template", "json-pointer", "relative-json-pointer", "regex"),
    ]
)
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("const", "enum", "default", "examples", "required", "x-guidance")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")
_OF_ARRAYS = ("prefixItems", "items")
_COUNTS = frozenset(
    f"{bound}{what}" for bound in ("min", "max") for what in ("Items", "Length", "Properties")
)
_MERGED = ("$ref", "anyOf", "oneOf")

_OLDER = re.compile(r"json-schema\.org/(draft-04|draft-06|draft-07|draft/2019-09)/")


def exact_schema(schema: Schema) -> dict[str, Any]:
    """The schema whose texts, by llguidance, all fit this one.

    It is read as the draft that its `$schema` names, else as 2020-12. Nothing that fits is lost but
    texts that engines of regular expressions disagree on, and further keys beside
    `patternProperties`.

    Raises GrammarInvalid, naming the keyword, where that cannot be.
    """
    if (found := _OLDER.search(str(schema.get("$schema", "")))) is not None:
        schema = _as_2020_12(schema, ref_alone=found[1] != "draft/2019-09")
    names = tuple(dict.fromkeys(_names(schema))) if has_merged_objects(schema) else ()
    made: dict[str, Any] = _Exact(names, has_one_of(schema)).schema(schema)
    return made


def changed(key: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """A keyword's value, with each schema in it changed. A keyword that is not known may hold some
    too, which a `$ref` points to."""
    if key in _NO_SCHEMAS:
        return value
    if isinstance(value, Mapping):
        is_map = key in SCHEMA_MAPS
        return {name: change(each) for name, each in value.items()} if is_map else change(value)
    return [change(each) for each in value] if isinstance(value, list | tuple) else value


def _as_2020_12(schema: Any, *, ref_alone: bool) -> Any:
    """A schema of an older draft; `ref_alone` where a `$ref`'s siblings are nothing, as up to 7."""
    if not isinstance(schema, Mapping):
        return schema
    change = partial(_as_2020_12, ref_alone=ref_alone)
    made = {key: changed(key, value, change) for key, value in schema.items()}
    if "$recursiveRef" in made:
        raise GrammarInvalid("$recursiveRef cannot be followed: write $ref")
    made.pop("$schema", None)
    if ref_alone and isinstance(made.get("$ref"), str):
        return {key: made[key] for key in ("$ref", "$defs", "definitions") if key in made}
    if ref_alone and isinstance(name := made.get("$id", made.get("id")), str):
        made.pop("$id", None)
        made |= {"$anchor": name[1:]} if name.startswith("#") else {"$id": name}
    others = made.pop("additionalItems", None)
    if isinstance(made.get("items"), list):
        made["prefixItems"] = made.pop("items")
        if others is not None:
            made["items"] = others
        if not made["prefixItems"]:
            del made["prefixItems"]
    return made


def _all_schemas(schema: Any) -> list[Schema]:
    """A schema, and all in it."""
    found: list[Schema] = []

    def note(each: Any) -> Any:
        if isinstance(each, Mapping):
            found.append(each)
            for key, value in each.items():
                changed(key, value, note)
        return each

    note(schema)
    return found


def has_merged_objects(schema: Schema) -> bool:
    """Whether llguidance may have to make one object of two that both must fit."""
    return any(
        "allOf" in each
        or sum(key in each for key in _MERGED) + any(key in each for key in _OF_OBJECTS) > 1
        for each in _all_schemas(schema)
    )


def has_one_of(schema: Schema) -> bool:
    """Whether a text must not fit two schemas: then none may be narrowed, or what fits ours alone
    could fit two of the author's."""
    return any("oneOf" in each for each in _all_schemas(schema))


def _names(schema: Schema) -> Iterator[str]:
    """Each name of a property, in the order in which they come."""
    for each in _all_schemas(schema):
        yield from _own_names(each)


def _own_names(schema: Schema) -> Iterator[str]:
    properties, required = schema.get("properties"), schema.get("required")
    yield from properties if isinstance(properties, Mapping) else ()
    if isinstance(required, list | tuple):
        yield from (name for name in required if isinstance(name, str))


@frozen
class _Exact:
    """`names` are those of all properties, where objects may be merged."""

    names: tuple[str, ...]
    has_one_of: bool

    def schema(self, schema: Any) -> Any:
        if not isinstance(schema, Mapping):
            return schema
        made = {key: changed(key, value, self.schema) for key, value in schema.items()}
        _texts(made)
        _numbers(made)
        for key in _COUNTS & set(made):
            made[key] = int(made[key]) if _is_whole(made[key]) else made[key]  # 2.0 is 2
        if any(key in made for key in _OF_OBJECTS):
            self._objects(made)
        if made.get("minProperties", 0) not in (0, 1):
            raise GrammarInvalid(
                "minProperties above 1 cannot be followed: a key may come twice, and counts once"
            )
        return _together(_together(made, _OF_OBJECTS), _OF_ARRAYS)

    def _objects(self, made: dict[str, Any]) -> None:
        """Keys beside `properties` by a pattern of our own: llguidance's lets a key of
        `properties` through that is written with an escape, with another value."""
        others = made.get("additionalProperties", True)
        patterns = made.get("patternProperties") or {}
        declared = list(self.names or dict.fromkeys(_own_names(made)))  # in one order everywhere
        if patterns:
            self._keys_by_pattern(made, declared)
        elif others is not False and declared:
            made["patternProperties"] = {_any_but(declared): others}
        if others is False or not (declared or patterns):
            return
        properties = made.get("properties") or {}
        made["properties"] = {name: properties.get(name, others) for name in declared}
        made["additionalProperties"] = False

    def _keys_by_pattern(self, made: dict[str, Any], declared: list[str]) -> None:
        patterns = made["patternProperties"]
        if made.get("additionalProperties", True) not in (True, False, {}):
            raise GrammarInvalid(
                "additionalProperties beside patternProperties cannot be followed, unless it is "
                "true or false"
            )
        if self.has_one_of and made.get("additionalProperties", True) is not False:
            raise GrammarInvalid(
                "patternProperties and oneOf cannot be followed together, unless "
                "additionalProperties is false"
            )
        # behind $ `re` lets a newline be: a key may fit two patterns then
        is_apart = len(patterns) == 1 or not any("$" in pattern for pattern in patterns)
        if is_apart and all(map(is_same_everywhere, patterns)):
            made["patternProperties"] = {exact_pattern(key): v for key, v in patterns.items()}
            return
        if self.has_one_of:
            raise GrammarInvalid(
                f"patternProperties and oneOf cannot be followed together: engines disagree on "
                f"which keys {next(iter(patterns))!r} takes"
            )
        odd = next((name for name in declared if not (name.isascii() and name.isprintable())), None)
        if odd is not None:
            raise GrammarInvalid(
                f"patternProperties cannot be followed: whether {next(iter(patterns))!r} takes the "
                f"property {odd!r} depends on the engine"
            )
        made["patternProperties"] = {plain_pattern(key): v for key, v in patterns.items()}


def _together(schema: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """The same with these keywords side by side: with an `anyOf` between them, llguidance does not
    read the one with the other."""
    theirs = {key: schema[key] for key in keys if key in schema}
    made: dict[str, Any] = {}
    for key, value in schema.items():
        made |= theirs if key in theirs else {key: value}
    return made


def _texts(made: dict[str, Any]) -> None:
    """A text's pattern and format."""
    pattern, form = made.get("pattern"), made.get("format")
    if isinstance(pattern, str):
        made["pattern"] = exact_pattern(pattern)
    if isinstance(form, str) and (form in _FORMATS or form not in _STANDARD_FORMATS):
        del made["format"]
    if isinstance(form, str) and form in _FORMATS:
        if "pattern" in made:
            made["allOf"] = [*made.get("allOf", []), {"pattern": _FORMATS[form]}]
        else:
            made["pattern"] = _FORMATS[form]


def _numbers(made: dict[str, Any]) -> None:
    """What `multipleOf` says where a validator divides floats: to it, 0.07 is no multiple of 0.01.
    Halves, quarters and so on are, as long as a float holds them."""
    step = made.get("multipleOf")
    if not isinstance(step, float):
        return
    if step.is_integer():
        made["multipleOf"] = int(step)
        return
    most = 2**52 // Fraction(step).denominator
    if Fraction(str(step)) != Fraction(step) or most < abs(step):
        raise GrammarInvalid(
            f"multipleOf {step} cannot be followed: validators divide floats, and do not find each "
            "multiple to be one; leave it out, or count in whole numbers"
        )
    made["minimum"] = max(made.get("minimum", -most), -most)
    made["maximum"] = min(made.get("maximum", most), most)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _any_but(names: list[str]) -> str:
    """A pattern of all texts but these."""
    return f"^(?:{_rest_of_any_but(sorted(set(names)))})$"


def _rest_of_any_but(endings: list[str]) -> str:
    """What may come where these would each complete a name. Sorted, and none twice."""
    by_first: dict[str, list[str]] = {}
    for ending in endings:
        if ending:
            by_first.setdefault(ending[0], []).append(ending[1:])
    branches = [] if "" in endings else [""]
    firsts = "".join(f"\\x{{{ord(first):X}}}" for first in by_first)
    branches.append(f"[{NO_NUL}&&[^{firsts}]](?s:.*)" if firsts else "(?s:.+)")
    for first, rest in by_first.items():
        branches.append(f"\\x{{{ord(first):X}}}(?:{_rest_of_any_but(rest)})")
    return "|".join(branches)
