"""ChatTemplate: messages to the text that a model was trained on, as its Jinja template says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from agentrt.errors import TemplateError, WeightsInvalid
from agentrt.gguf_file import GgufFile
from agentrt.gguf_model import token_ids_of
from agentrt.model_folder import read_json_object
from agentrt.types import Message

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """A compiled template, rendered in a sandbox with the settings that transformers uses.

    `tool_source` is a second template, used instead where tools are given. `special_tokens` maps
    names such as `bos_token` to their text. Raises TemplateError if a source does not compile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        tool_source: str | None = None,
    ) -> None:
        environment = _environment()
        self.source = source
        self.tool_source = source if tool_source is None else tool_source
        self.special_tokens = dict(special_tokens or {})
        self._plain = _compile(environment, source)
        self._with_tools = _compile(environment, self.tool_source)
        self.supports_tools = "tools" in jinja2.meta.find_undeclared_variables(
            environment.parse(self.tool_source)
        )

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The conversation as text. `tools` are JSON schemas in the OpenAI form.

        Raises TemplateError with the template's own words where it refuses the messages.
        """
        template = self._with_tools if tools else self._plain
        try:
            return template.render(
                messages=[_as_dict(message) for message in messages],
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except Exception as exc:  # a template is a program: it can raise anything
            roles = [message.role for message in messages]
            raise TemplateError(
                f"the chat template refused messages with roles {roles}: "
                f"{type(exc).__name__}: {exc}"
            ) from exc


def load_template(path: str | os.PathLike[str]) -> ChatTemplate | None:
    """The chat template of a folder or a GGUF file; None where it has none."""
    source = Path(path)
    return _from_folder(source) if source.is_dir() else _from_gguf(source)


def stable_prefix(previous: str, current: str) -> int:
    """The number of leading characters that two renderings have in common."""
    low, high = 0, min(len(previous), len(current))
    if previous[:high] == current[:high]:
        return high
    # Halving compares whole slices: a megabyte takes a millisecond, a loop over characters 50.
    while low + 1 < high:
        middle = (low + high) // 2
        if previous[low:middle] == current[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates know it: absent parts are absent keys, which templates test for."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": dict(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's text for training; here it only prints it."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own way to declare them

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as exc:
        raise TemplateError(
            f"the chat template does not compile, line {exc.lineno}: {exc}"
        ) from exc


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    # Local time, as in transformers: the model is told the day where its user is.
    return datetime.now().strftime(form)


def _from_gguf(path: Path) -> ChatTemplate | None:
    with GgufFile(path) as gguf:
        source = gguf.metadata.get("tokenizer.chat_template")
        if source is None:
            return None
        tokens = gguf.require("tokenizer.ggml.tokens", list)
        ids = dict(token_ids_of(gguf))
        ids["eos_token_id"] = gguf.metadata.get("tokenizer.ggml.eos_token_id")
        ids["unk_token_id"] = gguf.metadata.get("tokenizer.ggml.unknown_token_id")
        ids["pad_token_id"] = gguf.metadata.get("tokenizer.ggml.padding_token_id")
        named = {name: ids.get(f"{name}_id") for name in _SPECIAL_NAMES}
        special = {
            name: tokens[index]
            for name, index in named.items()
            if isinstance(index, int) and 0 <= index < len(tokens)
        }
        tool_source = gguf.metadata.get("tokenizer.chat_template.tool_use")
    return ChatTemplate(source, special, tool_source)


def _from_folder(folder: Path) -> ChatTemplate | None:
    config = read_json_object(folder / "tokenizer_config.json")
    special = _special_texts(read_json_object(folder / "special_tokens_map.json"))
    special |= _special_texts(config)
    if (folder / "chat_template.jinja").is_file():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        return ChatTemplate(source, special)
    templates = config.get("chat_template")
    if isinstance(templates, str):
        return ChatTemplate(templates, special)
    if not isinstance(templates, list):
        return None
    named = {entry["name"]: entry["template"] for entry in templates}
    if "default" not in named:
        raise WeightsInvalid(
            f"{folder / 'tokenizer_config.json'} has the chat templates {sorted(named)}, "
            "none of them is 'default'"
        )
    return ChatTemplate(named["default"], special, named.get("tool_use"))


def _special_texts(config: Mapping[str, Any]) -> dict[str, str]:
    texts = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            texts[name] = text
    return texts
