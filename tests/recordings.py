"""Recordings for tests: of agents with a tool above a scripted engine, and made by hand."""

import asyncio

from scripted import Script, scripted

from agentrt import GenerateOptions, tool
from agentrt.observer import agent
from agentrt.trace_record import read_lines, record

SIZES = {"num_blocks": 8000, "context": 4000, "step_tokens": 256}
OPTIONS = GenerateOptions(max_tokens=120)
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"key": "a"}}\n</tool_call>'


@tool
async def look_up(key: str) -> str:
    """Look a key up."""
    await asyncio.sleep(0)
    return f"{key} is 1"


async def run_agents(engine, num_agents):
    """Agents with a tool, one turn each."""

    async def run(number):
        with agent(f"agent {number}"):
            session = engine.session(system="Be short.", tools=[look_up], options=OPTIONS)
        await session.run(f"I am {number}. What is a?")
        return session

    return await asyncio.gather(*(run(number) for number in range(num_agents)))


class CallsOnce:
    """A script: a request without a tool's result calls the tool, one with it answers."""

    def __init__(self, tokenizer):
        self._tokenizer, self._scripts = tokenizer, {}

    def __call__(self, request, num_output_tokens):
        if request.id not in self._scripts:
            prompt = self._tokenizer.decode(request.tokens[: request.num_prompt_tokens].tolist())
            text = "It is 1." if "The tool says" in prompt else CALL
            self._scripts[request.id] = Script(self._tokenizer, [text])
        return self._scripts[request.id](request, num_output_tokens)


async def recorded(tokenizer, template, path, num_agents, **config):
    async with scripted(tokenizer, template, [], **(SIZES | config)) as engine:
        engine.runner.script = CallsOnce(tokenizer)
        async with record(engine, path):
            await run_agents(engine, num_agents)
        return engine.stats()


def lines_of(path):
    with path.open() as lines:
        return read_lines(lines, str(path))


def line(kind, **facts):
    return {"kind": kind, **facts}


HEADER = line(
    "recording", format=1, at=10.0, model="m", kernels="k", weights="w", device_bytes=100,
    host_bytes=0,
)  # fmt: skip


def submitted(request, at, agent=""):
    return line("submitted", at=at, request=request, agent=agent, turn=None, prompt_tokens=4)
