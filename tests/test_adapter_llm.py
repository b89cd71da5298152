"""The `llm` plugin: its Python interface with a scripted engine, its command with SmolLM2."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import flight_desk
import pytest
from scripted import LONG, call_text, scripted

from agentrt.adapters.blocking import blocking_engine
from agentrt.grammar import choice

llm = pytest.importorskip("llm")
from pydantic import BaseModel  # noqa: E402

from agentrt.adapters.llm import AgentrtModel  # noqa: E402

HERE = Path(__file__).parent
TOOLS = """import flight_desk

def find_flight(city: flight_desk.City) -> str:
    "Find the number of the flight to a city."
    return flight_desk.find_flight(city)

def count_seats(flight_number: str) -> str:
    "Count the free seats of a flight."
    return flight_desk.count_seats(flight_number)
"""


class Scripted(AgentrtModel):
    """The plugin's model above a scripted engine."""

    def __init__(self, tokenizer, template, texts):
        super().__init__("fake")
        self.engine = scripted(tokenizer, template, texts, **LONG)

    @contextmanager
    def opened(self):
        if self._bridge is not None:
            yield self._bridge
            return
        with blocking_engine(self.engine) as bridge:
            self._bridge = bridge
            yield bridge
            self._bridge = None


def find_flight(city: str) -> str:
    """Find a flight to a city."""
    return f"AB12 to {city}"


class Flight(BaseModel):
    number: str
    seats: int


def test_text_streams_and_a_conversation_finds_its_cache(tokenizer, template):
    model = Scripted(tokenizer, template, ["One two.", "Three."])
    with model.opened() as bridge:
        conversation = model.conversation()
        first = conversation.prompt("Count", system="Be short.")
        assert "".join(first) == "One two."
        second = conversation.prompt("Go on")
        assert second.text() == "Three."
        known = first.input_tokens + first.output_tokens
        assert second.response_json["cached_tokens"]["device"] == known - 1
        assert bridge.engine.stats().output_tokens == first.output_tokens + second.output_tokens


def test_tools_run_in_a_chain(tokenizer, template):
    texts = [call_text("find_flight", '{"city": "Rome"}'), "AB12 flies there."]
    model = Scripted(tokenizer, template, texts)
    with model.opened():
        chain = model.chain("Rome?", tools=[find_flight])
        assert chain.text() == "AB12 flies there."
        first, second = chain._responses
        assert [(c.name, c.arguments) for c in first.tool_calls()] == [
            ("find_flight", {"city": "Rome"})
        ]
        assert [result.output for result in second.prompt.tool_results] == ["AB12 to Rome"]


def test_a_schema_holds_the_answer_and_so_does_a_grammar(tokenizer, template):
    model = Scripted(tokenizer, template, ['{"number": "AB12", "seats": 3}', "yes"])
    with model.opened():
        answer = model.prompt("Which?", schema=Flight, max_tokens=60).text()
        assert json.loads(answer) == {"number": "AB12", "seats": 3}
        assert model.prompt("So?", grammar=choice(["yes", "no"]), session="s1").text() == "yes"


def run(*arguments, folder):
    command = [sys.executable, "-m", "llm", *arguments]
    environment = {**os.environ, "LLM_USER_PATH": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=False, env=environment
    )


@pytest.mark.timeout(300)  # four processes, each of which loads torch
def test_the_command_answers_fits_a_schema_and_logs(tmp_path):
    listed = run("models", folder=tmp_path)
    assert "agentrt/smollm2-135m" in listed.stdout
    done = run(
        "-m", "agentrt/smollm2-135m", "What is the capital of France?", "-o", "max_tokens", "24",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    schema = run(
        "-m", "agentrt/smollm2-135m", "--schema", "seats int", "Three seats.", "-o", "max_tokens",
        "40", folder=tmp_path,
    )  # fmt: skip
    assert isinstance(json.loads(schema.stdout)["seats"], int), schema.stdout
    logged = json.loads(run("logs", "list", "--json", "-n", "0", folder=tmp_path).stdout)
    assert len(logged) == 2
    assert all(each["input_tokens"] > 0 for each in logged)


@pytest.mark.timeout(300)
def test_the_commands_tools_run_and_the_next_call_has_what_they_said(tmp_path):
    """Two processes: what the first tool said is in the second one's call, by the log alone."""
    tools = tmp_path / "tools.py"
    tools.write_text(f"import sys\nsys.path.append({str(HERE)!r})\n{TOOLS}")
    common = ["--functions", str(tools), "--td", "-o", "tool_choice", "once", "-o", "max_tokens"]
    found = run(
        "-m", "agentrt/smollm2-135m", *common, "48", "Find the flight to Oslo.", folder=tmp_path
    )
    assert found.returncode == 0, found.stderr
    assert flight_desk.RESULTS[0] in found.stderr
    assert flight_desk.FLIGHT in found.stdout
    counted = run("-c", *common, "48", "Count the free seats of that flight.", folder=tmp_path)
    assert counted.returncode == 0, counted.stderr
    assert f"count_seats({flight_desk.CALLS[1][1]})" in counted.stderr
    assert flight_desk.RESULTS[1] in counted.stderr
