"""What the tests of OpenAI's API share: the model's name, messages, tools as bodies have them."""

MODEL = "fake"  # of a FakeEngine


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
