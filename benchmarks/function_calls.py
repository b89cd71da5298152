"""SmolLM2 over the function-calling data of the PyPI package bfcl-eval.

    pip download --no-deps bfcl-eval        # the data lies in the wheel
    python benchmarks/function_calls.py bfcl_eval-*.whl --cases 50
    python benchmarks/function_calls.py bfcl_eval-*.whl --log cases.jsonl    # all, can be resumed

Each case twice: held to the grammar of its tools, and free, with the same prompt. A call is valid
if it names a tool and `jsonschema` takes its arguments; a case is right if its calls are those that
the data expects, in any order. Dots in names become underscores, as our tools' names have none.
A turn that reaches --max-tokens is closed there (`end_in_time`); with `--ways cut` it is cut, maybe
within a call. `valid` is of all calls that were begun.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import string
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jsonschema
from attrs import asdict, frozen

from agentrt import Completion, Engine, EngineConfig, GenerateOptions, ToolCall
from agentrt.parsers import TurnParser, parse_turn
from agentrt.parsers_families import HERMES, OPEN_TAG
from agentrt.tool_prompt import render_tool_section
from agentrt.tools import Tool, ToolSet
from agentrt.types import ToolChoice

FOLDER = "bfcl_eval/data"
KINDS = {
    "simple": "simple_python",
    "multiple": "multiple",
    "parallel": "parallel",
    "parallel_multiple": "parallel_multiple",
}
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
    """What came of one case, in one way."""

    kind: str
    way: str
    name: str
    num_calls: int
    num_valid: int
    num_tokens: int
    is_cut: bool
    is_right: bool
    cut_text: str = ""  # what reached the limit
    num_begun: int = 0


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


async def constrained(
    engine: Engine, case: Case, kind: str, max_tokens: int
) -> tuple[tuple[ToolCall, ...], Completion]:
    """Held to the grammar: one call, or at least one where the kind has several."""
    return await _held(engine, case, kind, max_tokens, end_in_time=True)


async def cut(
    engine: Engine, case: Case, kind: str, max_tokens: int
) -> tuple[tuple[ToolCall, ...], Completion]:
    """The same, but cut where the tokens run out."""
    return await _held(engine, case, kind, max_tokens, end_in_time=False)


async def _held(
    engine: Engine, case: Case, kind: str, max_tokens: int, *, end_in_time: bool
) -> tuple[tuple[ToolCall, ...], Completion]:
    choice: ToolChoice = "required" if kind.startswith("parallel") else "once"
    async with engine.session(
        system=SYSTEM,
        tools=case.tools,
        tool_choice=choice,
        max_steps=1,
        options=GenerateOptions(max_tokens=max_tokens, end_in_time=end_in_time),
    ) as session:
        reply = await session.run(case.question)
    (step,) = reply.steps
    return tuple(each.call for each in step.results), step.completion


async def free(
    engine: Engine, case: Case, kind: str, max_tokens: int
) -> tuple[tuple[ToolCall, ...], Completion]:
    """The same prompt, and no grammar."""
    section = render_tool_section(ToolSet(case.tools))
    async with engine.session(
        system=f"{SYSTEM}\n\n{section}", options=GenerateOptions(max_tokens=max_tokens)
    ) as session:
        reply = await session.run(case.question)
    return parse_turn(TurnParser(HERMES), reply.text)[1], reply.steps[0].completion


Way = Callable[[Engine, Case, str, int], Awaitable[tuple[tuple[ToolCall, ...], Completion]]]
WAYS: dict[str, Way] = {"constrained": constrained, "cut": cut, "free": free}


async def outcome(engine: Engine, case: Case, kind: str, way: str, max_tokens: int) -> Outcome:
    calls, completion = await WAYS[way](engine, case, kind, max_tokens)
    is_cut = completion.finish_reason == "length"
    return Outcome(
        kind=kind,
        way=way,
        name=case.name,
        num_calls=len(calls),
        num_valid=sum(is_valid(case, call) for call in calls),
        num_tokens=len(completion.token_ids),
        is_cut=is_cut,
        is_right=is_right(case, calls),
        cut_text=completion.text if is_cut else "",
        num_begun=max(len(calls), completion.text.count(OPEN_TAG)),
    )


class Log:
    """Outcomes, in a file if there is one: a case that stands in it is not run again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str, str], Outcome] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._note(Outcome(**json.loads(line)))

    def add(self, outcome: Outcome) -> None:
        self._note(outcome)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.kind, outcome.way, outcome.name] = outcome


async def run_kind(
    engine: Engine, cases: list[Case], kind: str, way: str, log: Log, options: Any
) -> dict[str, Any]:
    """Run the cases that the log has not, several at a time, and sum up all."""
    limit = asyncio.Semaphore(options.agents)

    async def one(case: Case) -> None:
        if (kind, way, case.name) not in log.outcomes:
            async with limit:
                log.add(await outcome(engine, case, kind, way, options.max_tokens))

    begin_s = time.perf_counter()
    await asyncio.gather(*map(one, cases))
    row = summary([log.outcomes[kind, way, case.name] for case in cases])
    return {"kind": kind, "way": way, **row, "seconds": round(time.perf_counter() - begin_s, 1)}


def summary(outcomes: list[Outcome]) -> dict[str, int]:
    total: Counter[str] = Counter(cases=len(outcomes))
    for each in outcomes:
        total["calls"] += max(each.num_begun, each.num_calls)
        total["valid"] += each.num_valid
        total["tokens"] += each.num_tokens
        total["cut"] += each.is_cut
        total["right"] += each.is_right
        total["without_call"] += each.num_calls == 0
    return dict(total)


def show(row: dict[str, Any]) -> None:
    share = row["valid"] / row["calls"] if row["calls"] else float("nan")
    print(
        f"{row['kind']:<17} {row['way']:<12} cases {row['cases']:>4}  calls {row['calls']:>5}  "
        f"valid {share:7.1%}  right {row['right'] / row['cases']:6.1%}  "
        f"without call {row['without_call']:>3}  cut {row['cut']:>3}  "
        f"tokens {row['tokens']:>6}  {row['seconds']:>7.1f} s",
        flush=True,
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="bfcl_eval-*.whl")
    parser.add_argument("--cases", type=int, help="of each kind, evenly spread (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["constrained", "free"])
    parser.add_argument("--agents", type=int, default=8, help="cases at a time")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--log", type=Path, help="the outcome of each case, to go on from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, log = [], Log(options.log)
    async with Engine("smollm2-135m", EngineConfig(disk_kv_bytes=0)) as engine:
        for way in options.ways:
            for kind in options.kinds:
                cases = load(options.wheel, kind, options.cases)
                rows.append(await run_kind(engine, cases, kind, way, log, options))
                show(rows[-1])
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
