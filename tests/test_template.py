"""Chat templates: the text of transformers, to the character, and refusals that say why."""

import gzip
import json
from pathlib import Path

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from agentrt.errors import TemplateError, WeightsInvalid
from agentrt.registry import locate
from agentrt.template import ChatTemplate, load_template, stable_prefix
from agentrt.types import Message, ToolCall

TRACES = Path(__file__).parents[2] / "shared" / "traces" / "tau_airline.jsonl.gz"
SHORT = [
    {"role": "system", "content": "You help with flights <b>&</b> 'quotes'."},
    {"role": "user", "content": "Where is my flight?  "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "find", "arguments": '{"id": "é<1>", "days": [1, 2.5, null]}'}],
    },
    {"role": "tool", "content": '{"gate": "B4"}', "name": "find"},
    {"role": "assistant", "content": "At gate B4."},
]
TOOLS = [
    {"type": "function", "function": {"name": "find", "description": "<Finds> é", "parameters": {}}}
]
# Written for this test: every setting of the environment changes what it prints.
AGENT = """{{ bos_token }}
{%- if tools %}
    {{- '<tools>' }}
    {%- for tool in tools %}
{{ tool | tojson }}
    {%- endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' and not loop.first %}
        {{ raise_exception('system must come first') }}
    {% endif %}
<{{ message.role }}{% if message.name is defined %} {{ message.name }}{% endif %}>
{{ message.content }}
    {% if 'tool_calls' in message %}
        {% for call in message.tool_calls %}
call {{ call.function.name }} {{ call.function.arguments | tojson(indent=2) }}
            {% break %}
        {% endfor %}
    {% endif %}
    {% generation %}{{ loop.index }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}
{{ eos_token }}{{ documents is none }}{{ strftime_now('%%') }}"""


def conversations():
    if not TRACES.is_file():
        return [SHORT]
    with gzip.open(TRACES, "rt") as lines:
        return [json.loads(line)["messages"] for line in lines] + [SHORT]


def as_messages(conversation):
    return [
        Message(
            role=entry["role"],
            content=entry["content"],
            name=entry.get("name"),
            tool_calls=tuple(
                ToolCall(str(index), call["name"], json.loads(call["arguments"]))
                for index, call in enumerate(entry.get("tool_calls", []))
            ),
        )
        for entry in conversation
    ]


def as_dicts(conversation):
    """The same in the form that transformers takes."""
    entries = [dict(entry) for entry in conversation]
    for entry in entries:
        if "tool_calls" in entry:
            entry["tool_calls"] = [
                {
                    "id": str(index),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": json.loads(call["arguments"])},
                }
                for index, call in enumerate(entry["tool_calls"])
            ]
    return entries


def transformers_with(source, **special):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **special)


@pytest.fixture(scope="module")
def smollm():
    return load_template(locate("smollm2-135m", Path("~/.cache/agentrt").expanduser()))


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("which", ["smollm", "agent"])
def test_text_equals_that_of_transformers(smollm, which, prompt):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = smollm if which == "smollm" else ChatTemplate(AGENT, special)
    reference = transformers_with(template.source, **template.special_tokens)
    for conversation in conversations():
        for tools in (None, TOOLS):
            wanted = reference.apply_chat_template(
                as_dicts(conversation), tools=tools, tokenize=False, add_generation_prompt=prompt
            )
            assert template.render(as_messages(conversation), tools, prompt) == wanted


def test_the_default_model_has_a_template_without_tools(smollm):
    assert not smollm.supports_tools
    text = smollm.render([Message(role="user", content="Hi")])
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm.special_tokens["eos_token"] == "<|im_end|>"


def test_a_template_that_reads_tools_supports_them():
    assert ChatTemplate(AGENT).supports_tools
    assert not ChatTemplate("{{ 'no tools here' }}{% set tools = 1 %}{{ tools }}").supports_tools


def test_refusals_carry_the_templates_words():
    template = ChatTemplate(AGENT)
    wrong = [Message(role="user", content="a"), Message(role="system", content="b")]
    with pytest.raises(TemplateError, match=r"'user', 'system'.*system must come first"):
        template.render(wrong)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages + 1 }}", "{{ x.y.z }}"])
def test_any_failure_inside_a_template_is_ours(source):
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([])
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1] }}",
        "{{ raise_exception.__globals__.json }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(TemplateError):
        ChatTemplate(source).render([])


def test_a_source_that_does_not_compile_names_the_line():
    with pytest.raises(TemplateError, match="line 2"):
        ChatTemplate("a\n{% if %}")


def test_templates_of_folders(tmp_path):
    assert load_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        json.dumps({"chat_template": "{{ bos_token }}one", "bos_token": {"content": "<s>"}})
    )
    assert load_template(tmp_path).render([]) == "<s>one"
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]
    config.write_text(json.dumps({"chat_template": named}))
    template = load_template(tmp_path)
    assert template.supports_tools
    assert template.render([]) == "plain"
    assert template.render([], [{"a": 1}]) == "[{'a': 1}]"
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("file{{ eos_token }}")
    assert load_template(tmp_path).render([]) == "file</s>"
    (tmp_path / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": named[1:]}))
    with pytest.raises(WeightsInvalid, match="'default'"):
        load_template(tmp_path)
    config.write_text("{")
    with pytest.raises(WeightsInvalid, match=r"tokenizer_config\.json"):
        load_template(tmp_path)


def test_a_gguf_file_without_a_template(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert load_template(tmp_path / "a.gguf") is None


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_the_stable_prefix_is_the_longest_common_one(shared, left, right):
    length = stable_prefix(shared + left, shared + right)
    assert length >= len(shared)
    assert (shared + left)[:length] == (shared + right)[:length]
    ended = length == min(len(shared + left), len(shared + right))
    assert ended or (shared + left)[length] != (shared + right)[length]
