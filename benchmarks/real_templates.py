"""Real chat templates: which form of calls each is read in, and a turn with tools through each.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.16    # its source holds them
    python benchmarks/real_templates.py llama_cpp_python-0.3.16.tar.gz

The model is scripted: it answers with two calls in the form that the template's family has, then
in text, and then a second turn follows. A template passes if both tools ran, the text came, and the
conversation could be rendered again; one that refuses our messages says so in its own words.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from agentrt import GenerateOptions, TextDelta, ToolResult, tool
from agentrt.errors import TemplateError
from agentrt.template import ChatTemplate
from agentrt.tokenizer import Tokenizer
from agentrt.types import ToolCall

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes import FakeEngine, Script, byte_tokenizer

FOLDER = "/vendor/llama.cpp/models/templates/"
CALLS = [ToolCall("", "add", {"a": 1, "b": 2}), ToolCall("", "add", {"a": 3, "b": 4})]
# By a part of the file's name, the form that the family is known to have.
FORMS = {
    "Hermes": "hermes",
    "Qwen": "hermes",
    "meta-llama": "llama-json",
    "Nemo": "mistral",
    "Mistral-Small": "mistral-named",
    "Devstral": "mistral-named",
}


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def templates(archive: Path) -> Iterator[tuple[str, str]]:
    """Names and sources."""
    with tarfile.open(archive) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            if FOLDER in member.name and member.name.endswith(".jinja"):
                opened = files.extractfile(member)
                assert opened is not None
                yield member.name.split(FOLDER)[1], opened.read().decode()


async def turns(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[str, bool, str]:
    """The form, whether the template itself tells of the tools, and what went wrong."""
    engine = FakeEngine(
        num_blocks=60_000, context=60_000, tokenizer=tokenizer, template=template, checked=False,
        step_tokens=4096,
    )  # fmt: skip
    chat = engine.chat
    thought = "<think>\nHm.\n</think>\n\n" if chat.thinks else ""
    said = [thought + chat.call_format.render(CALLS), f"{thought}Done.", f"{thought}Bye."]
    engine.runner.script = Script(tokenizer, said)
    try:
        async with engine:
            session = engine.session(tools=[add], options=GenerateOptions(max_tokens=900))
            events = [event async for event in session.stream("Add.")]
            bye = await session.run("Thanks.")
    except TemplateError as exc:
        return chat.call_format.name, chat.takes_tools, str(exc)
    results = [event.content for event in events if isinstance(event, ToolResult)]
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    is_right = (results, text, bye.text) == (["3", "7"], "Done.", "Bye.")
    return chat.call_format.name, chat.takes_tools, "" if is_right else f"WRONG {results} {text!r}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="llama_cpp_python-*.tar.gz")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer(Path(folder))
    for name, source in templates(options.archive):
        template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "<|im_end|>"})
        form, is_native, wrong = asyncio.run(turns(template, tokenizer))
        known = next((form for part, form in FORMS.items() if part in name), None)
        is_known = known is None or (known, True) == (form, is_native) or "DeepSeek" in name
        told = "by the template" if is_native else "by our default"
        verdict = wrong[:90] if wrong else "ok" if is_known else f"WRONG, expected {known}"
        print(f"{name:52} {form:14} {told:15} {verdict}", flush=True)


if __name__ == "__main__":
    main()
