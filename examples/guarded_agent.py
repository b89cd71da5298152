"""Guards in front of the model and behind it: what is private stays private, whatever it writes.

Two of them redact by pattern. The third asks a classifier, here a set of rules, about each sentence
before anyone sees it. With `await model.classify(text)` instead it would ask a model.
"""

import asyncio
import re

from agentrt import Engine, GenerateOptions, TextDelta, ToolResult, tool
from agentrt.guards_classifier import ClassifierGuard
from agentrt.guards_patterns import redact_emails, redact_secrets

RULES = {
    "dosage": re.compile(r"\d+[ -]?(?:mg|milligrams?|tablets?|pills?)", re.IGNORECASE),
    "weapon": re.compile(r"\b(?:gunpowder|explosives?)\b", re.IGNORECASE),
}


async def classify(text: str) -> str | None:
    """The label of a text, or None."""
    return next((label for label, rule in RULES.items() if rule.search(text)), None)


@tool
async def look_up_customer(name: str) -> str:
    """Look up a customer by name."""
    return f"{name} writes from {name.lower()}@example.org and logs in with sk-live{'0123' * 6}."


async def main() -> None:
    rules = ClassifierGuard(
        classify=classify,
        replies={"dosage": " Please ask a doctor about that."},
        stops={"weapon": "we do not talk about weapons"},
    )
    async with Engine(
        "smollm2-135m",
        output_guards=[redact_emails(), redact_secrets(), rules],
        input_guards=[redact_emails(), redact_secrets()],
    ) as engine:
        options = GenerateOptions(max_tokens=64)
        async with engine.session(
            tools=[look_up_customer], tool_choice="once", options=options
        ) as session:
            print("tool   |", end=" ")
            async for event in session.stream("Please look up the customer Ada."):
                if isinstance(event, ToolResult):
                    print(event.content, "\nanswer |", end=" ")
                elif isinstance(event, TextDelta):
                    print(event.text, end="")
            print()
        for question in (
            "My mail is ann.lee@mail.example.org. Please repeat my mail.",
            "What is the usual dose of ibuprofen for an adult, in mg?",
            "What is gunpowder made of?",
        ):
            async with engine.session(options=options) as session:
                reply = await session.run(question)
                print("asks   |", session.messages[0].content)
                print(
                    reply.finish_reason.ljust(6), "|", reply.reason or " ".join(reply.text.split())
                )


asyncio.run(main())
