"""What the tests of OpenAI's API share: a scripted engine, tools as bodies have them, calls."""

from fakes import FakeEngine, Script

MODEL = "fake"  # of a FakeEngine


def scripted(tokenizer, template, texts, **config):
    """An engine that answers with these texts, one a request."""
    engine = FakeEngine(
        num_blocks=2000, context=6000, tokenizer=tokenizer, template=template, checked=False,
        **{"step_tokens": 512, **config},
    )  # fmt: skip
    engine.runner.script = Script(tokenizer, texts)
    return engine


def call_text(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def user(text):
    return {"role": "user", "content": text}


NUMBERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ADD = {"name": "add", "description": "Add two numbers.", "parameters": NUMBERS}
SUBTRACT = {"name": "subtract", "description": "Subtract b from a.", "parameters": NUMBERS}
CHAT_TOOLS = [{"type": "function", "function": each} for each in (ADD, SUBTRACT)]
RESPONSE_TOOLS = [{"type": "function", "strict": True, **each} for each in (ADD, SUBTRACT)]
