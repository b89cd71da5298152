"""SmolLM2 over the function-calling data of the PyPI package bfcl-eval.

    pip download --no-deps bfcl-eval        # the data lies in the wheel
    python benchmarks/function_calls.py bfcl_eval-*.whl --cases 50

Each case twice: held to the grammar of its tools, and free, with the same prompt. A call is valid
if it names a tool and `jsonschema` takes its arguments; a case is right if its calls are those that
the data expects, in any order. Dots in names become underscores, as our tools' names have none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import string
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
from attrs import frozen

from agentrt import Engine, EngineConfig, GenerateOptions, ToolCall
from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import HERMES
from agentrt.tool_prompt import render_tool_section
from agentrt.tools import Tool, ToolSet

FOLDER = "bfcl_eval/data"
KINDS = {"simple": "simple_python", "multiple": "multiple", "parallel": "parallel"}
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
SYSTEM = "You call functions."


@frozen
class Case:
    """One question, its tools, and the calls that answer it: name to allowed values by argument."""

    name: str
    question: str
    tools: tuple[Tool, ...]
    expected: tuple[tuple[str, dict[str, list[Any]]], ...]


@frozen
class Outcome:
    """What came of one case."""

    num_calls: int
    num_valid: int
    is_cut: bool
    is_right: bool


def load(wheel: Path, kind: str, num_cases: int | None) -> list[Case]:
    """The cases of one kind: all, or as many, evenly spread."""
    with zipfile.ZipFile(wheel) as archive:
        name = f"BFCL_v4_{KINDS[kind]}.json"
        asked = archive.read(f"{FOLDER}/{name}").decode().splitlines()
        answers = archive.read(f"{FOLDER}/possible_answer/{name}").decode().splitlines()
    pairs = list(zip(map(json.loads, asked), map(json.loads, answers), strict=True))
    step = 1 if num_cases is None else max(1, len(pairs) // num_cases)
    return [_case(one, answer) for one, answer in pairs[::step][:num_cases]]


def _case(asked: dict[str, Any], answer: dict[str, Any]) -> Case:
    assert asked["id"] == answer["id"]
    tools = tuple(
        Tool(
            name=_tool_name(each["name"]),
            description=each["description"],
            parameters=json_schema_of(each["parameters"]),
            function=_accept,
        )
        for each in asked["function"]
    )
    expected = tuple(
        (_tool_name(name), arguments)
        for call in answer["ground_truth"]
        for name, arguments in call.items()
    )
    question = "\n".join(message["content"] for message in asked["question"][0])
    return Case(asked["id"], question, tools, expected)


def _accept(**_: Any) -> str:
    return "done"


def _tool_name(name: str) -> str:
    return name.replace(".", "_")


def json_schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema from the data's own dialect of it."""
    made = {key: value for key, value in schema.items() if key != "optional"}
    kind = TYPES.get(made.get("type", ""), made.get("type"))
    made.pop("type", None)
    if kind is not None:
        made["type"] = kind
    if "properties" in made:
        made["properties"] = {
            name: json_schema_of(inner) for name, inner in made["properties"].items()
        }
        made["additionalProperties"] = False  # an argument that the function has not is wrong
    if isinstance(made.get("items"), dict):
        made["items"] = json_schema_of(made["items"])
    return made


# ---- judging


def is_valid(case: Case, call: ToolCall) -> bool:
    """Whether the call names a tool and its arguments fit the tool's schema."""
    found = next((each for each in case.tools if each.name == call.name), None)
    if found is None:
        return False
    try:
        jsonschema.validate(dict(call.arguments), dict(found.parameters))
    except jsonschema.ValidationError:
        return False
    return True


def is_right(case: Case, calls: tuple[ToolCall, ...]) -> bool:
    """Whether these are the expected calls, in any order."""
    left = list(case.expected)
    for call in calls:
        match = next((each for each in left if _matches(call, *each)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _matches(call: ToolCall, name: str, allowed: dict[str, list[Any]]) -> bool:
    if call.name != name or not set(call.arguments) <= set(allowed):
        return False
    return all(
        _is_among(call.arguments[key], values) if key in call.arguments else "" in values
        for key, values in allowed.items()
    )


def _is_among(value: Any, allowed: list[Any]) -> bool:
    if isinstance(value, dict):
        return any(
            isinstance(each, dict)
            and set(value) <= set(each)
            and all(_is_among(value[k], each[k]) if k in value else "" in each[k] for k in each)
            for each in allowed
        )
    return any(_plain(value) == _plain(each) for each in allowed)


def _plain(value: Any) -> Any:
    """A value as it is compared: texts without case, spaces and marks, whole floats as int."""
    if isinstance(value, str):
        return value.lower().translate(str.maketrans("", "", f"{string.whitespace},./-_*^'\""))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return (isinstance(value, bool), value)


# ---- running


async def constrained(engine: Engine, case: Case, kind: str, max_tokens: int) -> Outcome:
    """Held to the grammar: one call, or at least one where the kind has several."""
    choice = "required" if kind == "parallel" else "once"
    async with engine.session(
        system=SYSTEM,
        tools=case.tools,
        tool_choice=choice,
        max_steps=1,
        options=GenerateOptions(max_tokens=max_tokens),
    ) as session:
        reply = await session.run(case.question)
    (step,) = reply.steps
    return _outcome(case, tuple(each.call for each in step.results), step.completion.finish_reason)


async def free(engine: Engine, case: Case, kind: str, max_tokens: int) -> Outcome:
    """The same prompt, and no grammar."""
    section = render_tool_section(ToolSet(case.tools))
    async with engine.session(
        system=f"{SYSTEM}\n\n{section}", options=GenerateOptions(max_tokens=max_tokens)
    ) as session:
        reply = await session.run(case.question)
    calls = parse_turn(TurnParser(HERMES), reply.text)[1]
    return _outcome(case, calls, reply.steps[0].completion.finish_reason)


def _outcome(case: Case, calls: tuple[ToolCall, ...], finish_reason: str) -> Outcome:
    num_valid = sum(is_valid(case, call) for call in calls)
    return Outcome(len(calls), num_valid, finish_reason == "length", is_right(case, calls))


async def run_kind(engine: Engine, cases: list[Case], kind: str, options: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": kind, "cases": len(cases)}
    for name, way in (("constrained", constrained), ("free", free)):
        limit = asyncio.Semaphore(options.agents)

        async def one(case: Case, way: Any = way, limit: Any = limit) -> Outcome:
            async with limit:
                outcome: Outcome = await way(engine, case, kind, options.max_tokens)
                return outcome

        begin_s = time.perf_counter()
        outcomes = await asyncio.gather(*map(one, cases))
        total: Counter[str] = Counter()
        for outcome in outcomes:
            total["calls"] += outcome.num_calls
            total["valid"] += outcome.num_valid
            total["cut"] += outcome.is_cut
            total["right"] += outcome.is_right
            total["without_call"] += outcome.num_calls == 0
        row[name] = {**total, "seconds": round(time.perf_counter() - begin_s, 1)}
        show(row, name)
    return row


def show(row: dict[str, Any], name: str) -> None:
    part, num_cases = row[name], row["cases"]
    share = part["valid"] / part["calls"] if part["calls"] else float("nan")
    print(
        f"{row['kind']:<9} {name:<12} cases {num_cases:>4}  calls {part['calls']:>4}  "
        f"valid {share:7.1%}  right {part['right'] / num_cases:6.1%}  "
        f"without call {part['without_call']:>3}  cut {part['cut']:>3}  {part['seconds']:>7.1f} s",
        flush=True,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="bfcl_eval-*.whl")
    parser.add_argument("--cases", type=int, help="of each kind, evenly spread (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--agents", type=int, default=8, help="cases at a time")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = EngineConfig(disk_kv_bytes=0)
    async with Engine("smollm2-135m", config) as engine:
        rows = [
            await run_kind(engine, load(options.wheel, kind, options.cases), kind, options)
            for kind in options.kinds
        ]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
