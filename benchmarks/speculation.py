"""What drafts save: forward passes of recorded tool calls, and the wall time of agents with tools.

    python benchmarks/speculation.py --shared DIR [--conversations 100] [--repeats 3] [--json FILE]

First the calls that the airline conversations recorded, token by token as SmolLM2's tokenizer
spells them: drafts come from the call grammar of the tools seen and from the conversation so far,
and a pass yields the tokens of the draft that are the recorded ones, and one more. No model runs.
Then the four agents of examples/airline_agent.py on the real model, with speculation off and on in
turn; what they say must not differ. Last a workload of random words, where no draft is right.
"""

import argparse
import asyncio
import contextlib
import gzip
import io
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from agentrt import Engine, EngineConfig, GenerateOptions, Message, ToolCall
from agentrt.chat import Chat
from agentrt.config import default_cache_dir
from agentrt.grammar import Constraint, GrammarCompiler
from agentrt.grammar_calls import TurnShape, tool_calls
from agentrt.output import OutputText
from agentrt.parsers_families import HERMES
from agentrt.registry import locate
from agentrt.request import Request
from agentrt.speculate import MAX_DRAFT_TOKENS, Drafter
from agentrt.template import load_template
from agentrt.tokenizer import Tokenizer, load_tokenizer
from agentrt.tools import Tool, ToolSet

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from airline_agent import CUSTOMERS, serve
from airline_database import AirlineDatabase

JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number"}


def load(shared: Path, count: int) -> list[list[dict[str, Any]]]:
    with gzip.open(shared / "traces" / "tau_airline.jsonl.gz") as file:
        return [json.loads(line)["messages"] for line in file][:count]


def schema_of(values: list[Any]) -> dict[str, Any]:
    """The schema of all these values of one argument."""
    if all(isinstance(value, dict) for value in values):
        names = list(dict.fromkeys(name for value in values for name in value))
        inner = {name: schema_of([v[name] for v in values if name in v]) for name in names}
        required = [name for name in names if all(name in value for value in values)]
        return {"type": "object", "properties": inner, "required": required} | {
            "additionalProperties": False
        }
    if all(isinstance(value, list) for value in values):
        items = [item for value in values for item in value]
        return {"type": "array", "items": schema_of(items) if items else {}}
    kinds = sorted({JSON_TYPES.get(type(value), "null") for value in values})
    bound = {"maxLength": 4096} if "string" in kinds else {}  # else the grammar's default, 256
    return {"type": kinds[0] if len(kinds) == 1 else kinds} | bound


def ordered(value: Any, schema: dict[str, Any]) -> Any:
    """The value with its keys in the schema's order, as the grammar has them."""
    if isinstance(value, dict):
        inner = schema.get("properties", {})
        return {name: ordered(value[name], inner[name]) for name in inner if name in value}
    return (
        [ordered(v, schema.get("items", {})) for v in value] if isinstance(value, list) else value
    )


def tools_of(conversations: list[list[dict[str, Any]]]) -> ToolSet:
    """The tools that were called, with the arguments that were seen."""
    calls: dict[str, list[Any]] = {}
    for messages in conversations:
        for message in messages:
            for call in message.get("tool_calls", []):
                calls.setdefault(call["name"], []).append(json.loads(call["arguments"]))

    async def nothing() -> None: ...

    return ToolSet(
        [
            Tool(name=name, description=name, parameters=schema_of(arguments), function=nothing)
            for name, arguments in calls.items()
        ]
    )


def passes_of(request: Request, drafter: Drafter, num_tokens: int) -> int:
    """Forward passes until the recorded tokens behind the prompt are out."""
    recorded = request.tokens[request.num_prompt_tokens :][:num_tokens].copy()
    passes = 0
    while request.num_output_tokens < num_tokens:
        done = request.num_output_tokens
        request.tokens[request.num_tokens :] = 0
        num_draft = drafter.draft(request, len(request.tokens), MAX_DRAFT_TOKENS)
        draft = request.tokens[request.num_tokens :][:num_draft]
        right = 0
        while (
            right < num_draft
            and done + right < num_tokens
            and draft[right] == recorded[done + right]
        ):
            right += 1
        drafter.checked(request, num_draft, right)
        for token in recorded[done : done + right + 1].tolist():
            assert request.constraint is not None
            assert request.constraint.accept(token), "the recorded call does not fit its grammar"
            request.append(token)
        passes += 1
    return passes


def request_of(
    prompt: list[int], recorded: list[int], tokenizer: Tokenizer, constraint: Constraint
) -> Request:
    """A request at its prompt's end, with the recorded tokens where the output will be."""
    num_tokens = len(prompt) + len(recorded)
    tokens = np.zeros(num_tokens + MAX_DRAFT_TOKENS + 2, np.int32)
    tokens[:num_tokens] = [*prompt, *recorded]
    return Request(
        id="recorded",
        options=GenerateOptions(),
        namespace="",
        sink=lambda _: None,
        text=OutputText(tokenizer.stream(), ()),
        tokens=tokens,
        num_prompt_tokens=len(prompt),
        eos_token_ids=tokenizer.eos_token_ids,
        constraint=constraint,
        submitted_s=0.0,
    )


def recorded_calls(shared: Path, count: int) -> dict[str, Any]:
    conversations = load(shared, count)
    tools = tools_of(conversations)
    path = locate("smollm2-135m", default_cache_dir())
    tokenizer = load_tokenizer(path)
    chat = Chat(tokenizer, load_template(path), tokenizer.vocab_size, tokenizer.eos_token_ids)
    compiler = GrammarCompiler(tokenizer.backend, tokenizer.vocab_size, tokenizer.eos_token_ids)
    grammar = tool_calls(tools, shape=TurnShape(required=True, parallel=False))
    drafter = Drafter()
    num_calls = num_tokens = num_passes = 0
    for messages in conversations:
        history: list[Message] = []
        for entry in messages:
            for call in entry.get("tool_calls", []):
                tool = tools.get(call["name"])
                assert tool is not None
                arguments = ordered(json.loads(call["arguments"]), tool.parameters)
                ids = tokenizer.encode(HERMES.render([ToolCall("", call["name"], arguments)]))
                prompt = tokenizer.encode(chat.render(history, tools), allow_special=True)
                request = request_of(prompt, ids, tokenizer, compiler.compile(grammar))
                num_passes += passes_of(request, drafter, len(ids))
                drafter.finished(request)
                num_calls, num_tokens = num_calls + 1, num_tokens + len(ids)
            calls = tuple(
                ToolCall(str(i), call["name"], json.loads(call["arguments"]))
                for i, call in enumerate(entry.get("tool_calls", []))
            )
            history.append(
                Message(role=entry["role"], content=entry["content"] or "", tool_calls=calls)
            )
    return {"calls": num_calls, "tokens": num_tokens, "passes_per_token": num_passes / num_tokens}


def config(*, speculation: bool) -> EngineConfig:
    return EngineConfig(disk_kv_bytes=0, speculation=speculation)


async def agents(*, speculation: bool) -> tuple[float, str, int]:
    """(wall seconds, all dialogues, steps)."""
    with tempfile.TemporaryDirectory() as folder:
        database = AirlineDatabase(Path(folder) / "airline.db")
        async with Engine("smollm2-135m", config(speculation=speculation)) as engine:
            await engine.generate("Hello", GenerateOptions(max_tokens=2))
            shown, begin = io.StringIO(), time.perf_counter()
            with contextlib.redirect_stdout(shown):
                async with asyncio.TaskGroup() as group:
                    for customer, messages in CUSTOMERS.items():
                        group.create_task(serve(engine, database, customer, messages))
            wall_s = time.perf_counter() - begin
            return wall_s, said_by_customer(shown.getvalue()), engine.stats().steps


def said_by_customer(shown: str) -> str:
    """Each customer's dialogue in one line: where lines break depends on how the text came."""
    said: dict[str, list[str]] = {customer: [] for customer in CUSTOMERS}
    for line in shown.splitlines():
        who, _, text = line.partition("|")
        said[who.split()[0]].append(text.strip())
    return "\n".join(" ".join(texts) for texts in said.values())


async def noise(*, speculation: bool) -> float:
    """Wall seconds of 4 streams drawn at a temperature at which nothing repeats."""
    async with Engine("smollm2-135m", config(speculation=speculation)) as engine:
        rng = random.Random(1)
        prompts = [[rng.randrange(1000, 40_000) for _ in range(300)] for _ in range(4)]
        await engine.generate(prompts[0][:9], GenerateOptions(max_tokens=2))
        begin = time.perf_counter()
        options = [
            GenerateOptions(max_tokens=100, ignore_eos=True, temperature=3.0, seed=n)
            for n in range(4)
        ]
        await asyncio.gather(*map(engine.generate, prompts, options))
        return time.perf_counter() - begin


async def on_the_model(repeats: int) -> dict[str, Any]:
    walls: dict[bool, list[float]] = {False: [], True: []}
    random_words: dict[bool, list[float]] = {False: [], True: []}
    said: dict[bool, str] = {}
    steps: dict[bool, int] = {}
    for _ in range(repeats):
        for speculation in (False, True):
            wall_s, text, steps[speculation] = await agents(speculation=speculation)
            walls[speculation].append(wall_s)
            assert said.setdefault(speculation, text) == text
            random_words[speculation].append(await noise(speculation=speculation))
    assert said[False] == said[True], "drafts changed what was said"
    medians = {key: statistics.median(value) for key, value in walls.items()}
    noises = {key: statistics.median(value) for key, value in random_words.items()}
    return {
        "agents_off_s": medians[False],
        "agents_on_s": medians[True],
        "agents_ratio": medians[True] / medians[False],
        "steps_off": steps[False],
        "steps_on": steps[True],
        "noise_ratio": noises[True] / noises[False],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = recorded_calls(arguments.shared, arguments.conversations)
    print(
        f"{results['calls']} recorded calls, {results['tokens']} tokens: "
        f"{results['passes_per_token']:.2f} forward passes a token",
        flush=True,
    )
    if arguments.repeats:
        results |= asyncio.run(on_the_model(arguments.repeats))
        print("4 agents: {agents_off_s:.1f} s, with drafts {agents_on_s:.1f} s".format(**results))
        print("    ratio {agents_ratio:.2f}; steps {steps_off}, {steps_on}".format(**results))
        print("random words: ratio {noise_ratio:.3f}".format(**results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
