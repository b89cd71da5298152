"""The README and the examples do what they say, with the real model."""

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from agentrt.__main__ import main
from agentrt.config import default_cache_dir

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text()
LINE = re.compile(r"(\w+) +(asks|calls|gets|hears) +\| (.*)")
CHANGE = re.compile(r"  (\w+) (\w+): (.+) -> (.+)")


@pytest.fixture
def run_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    """Runs an example, with nothing in its disk tier, and returns what it printed."""
    models = default_cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (tmp_path / "models").symlink_to(models)
    monkeypatch.setenv("AGENTRT_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python examples/...` does

    def run(name: str) -> str:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


# ---- the README


def test_every_python_block_of_the_readme_is_an_example():
    blocks = re.findall(r"(?:<!-- (\S+?),[^\n]*-->\n)?```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for name, code in blocks:
        assert name, f"name the file of this block above it:\n{code}"
        assert code == (ROOT / name).read_text()


def test_the_readme_names_scripts_and_commands_that_exist(capsys):
    scripts = re.findall(r"python ((?:examples|benchmarks)/\S+\.py)", README)
    assert "examples/airline_agent.py" in scripts
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    listed = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))
    named = re.search(
        r"`python -m agentrt --help` lists the command line:\s(.*?)\.", README, re.DOTALL
    )
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == listed


# ---- the examples


def test_quickstart_calls_its_tool_and_answers_from_the_result(run_example: Callable[[str], str]):
    arguments, answer = run_example("quickstart.py").strip().split(" -> ", 1)
    assert arguments == "{'reservation_id': 'ZX12AB'}"
    assert "May 20" in answer


def test_the_guarded_agent_shows_nothing_that_is_private(run_example: Callable[[str], str]):
    said = run_example("guarded_agent.py")
    lines = [line.split("|", 1)[1].strip() for line in said.splitlines()]
    assert lines[0] == "Ada writes from [e-mail] and logs in with [key]."
    assert "My mail is [e-mail]. Please repeat my mail." in lines
    assert not re.search(r"\w@\w|sk-live|\d+[ -]?mg", said)
    assert "Please ask a doctor about that." in said
    assert lines[-1] == "we do not talk about weapons"


@pytest.mark.timeout(300)  # 5 s on two cores with nothing else to do
def test_airline_agents_serve_their_customers(run_example: Callable[[str], str]):
    dialogue, cost, changes = run_example("airline_agent.py").split("\n\n")
    customers = runpy.run_path(str(EXAMPLES / "airline_agent.py"))["CUSTOMERS"]
    spoken: dict[str, list[tuple[str, str]]] = {name: [] for name in customers}
    for line in dialogue.splitlines():
        match = LINE.fullmatch(line)
        assert match is not None, line
        spoken[match[1]].append((match[2], match[3]))
    for customer, messages in customers.items():
        check_conversation(spoken[customer], messages)
    assert spoken_at_once(dialogue) == set(customers)
    found = {(match[1], match[2]): match[4] for match in CHANGE.finditer(changes)}
    assert found == changes_of_calls(spoken)
    assert found == {
        ("JG7FMM", "cabin"): "economy",
        ("4BMN53", "bags"): "2",
        ("H9ZU1C", "bags"): "1",
        ("M05KNL", "status"): "cancelled",
    }
    check_cost(cost, num_turns=sum(map(len, customers.values())))


def check_conversation(lines: list[tuple[str, str]], messages: list[str]) -> None:
    """Each message is followed by one call, its result, and an answer that repeats the result."""
    assert [text for kind, text in lines if kind == "asks"] == messages
    turns = "\n".join(f"{kind} {text}" for kind, text in lines).split("asks ")[1:]
    for turn in turns:
        kinds = [line.split(" ", 1)[0] for line in turn.splitlines()[1:]]
        assert kinds[:2] == ["calls", "gets"]
        assert set(kinds[2:]) == {"hears"}
        result, *answer = [line.split(" ", 1)[1] for line in turn.splitlines()[2:]]
        assert result.removeprefix("Error: ").rstrip(".") in " ".join(answer)


def spoken_at_once(dialogue: str) -> set[str]:
    """The customers that were being served before the first of them was answered."""
    return {line.split()[0] for line in dialogue.split("hears", 1)[0].splitlines()}


def changes_of_calls(spoken: dict[str, list[tuple[str, str]]]) -> dict[tuple[str, str], str]:
    """What the printed calls that did not fail must have changed."""
    changes = {}
    for lines in spoken.values():
        results = [text for kind, text in lines if kind == "gets"]
        calls = [text for kind, text in lines if kind == "calls"]
        for call, result in zip(calls, results, strict=True):
            name, (reservation_id, *values) = call.split("(")[0], re.findall(r"='?(\w+)", call)
            if name == "cancel_reservation":
                name, values = "set_status", ["cancelled"]
            if name.startswith("set_") and not result.startswith("Error"):
                changes[reservation_id, name.removeprefix("set_")] = values[0]
    return changes


def check_cost(table: str, *, num_turns: int) -> None:
    numbers = {
        line[:15].strip(): int(line[15:].split()[0].replace(",", "")) for line in table.splitlines()
    }
    assert numbers["turns"] == num_turns
    assert numbers["prompt tokens"] == numbers["from cache"] + numbers["computed"]
    # 22 prompts begin with the same 500 tokens of system message and tools: computed once
    assert 500 < numbers["computed"] < 0.15 * numbers["prompt tokens"]
    assert numbers["output tokens"] > 20 * num_turns
