"""Constrained decoding over llguidance: grammars as text, and the token masks they allow.

The functions at the top build text for `GenerateOptions.grammar`; they do no work and no I/O.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from agentrt.errors import GrammarInvalid, ModelUnsupported
from agentrt.tool_prompt import CLOSE_TAG, OPEN_TAG

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from agentrt.tools import Tool, ToolSet

# A tiny model repeats itself without end wherever a grammar lets it. These bounds hold where the
# tool's schema sets none; they are far above what a call needs.
MAX_STRING_CHARACTERS = 256
MAX_KEY_CHARACTERS = 64
MAX_ITEMS = 16
MAX_CALLS = 16
MAX_INTEGER = 10**18  # llguidance handles bounds as float64 and fails just below 2**63

# The one way that json.dumps prints; llguidance's default, any white space anywhere, is one more
# thing to repeat without end.
_JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

# Slices are sets of tokens that llguidance allows in one go where the state admits them all. The
# last one is for free text: with it a turn's first mask takes 0.1 ms, not 1 ms (49,152 tokens).
_FREE_TEXT_SLICE = "[^<>]+"
_MAX_PROTOTYPES = 64  # compiled grammars that are kept; a session asks for the same one every turn


def json_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of one JSON value that fits the schema, laid out as `json.dumps` does."""
    return f"start: %json {_dump({'x-guidance': _JSON_LAYOUT, **schema})}\n"


def regex(pattern: str) -> str:
    """The grammar of a text that matches the whole pattern (Rust's regex syntax)."""
    return _dump({"grammars": [{"lark_grammar": f"start: /{_escape_slashes(pattern)}/\n"}]})


def choice(options: Sequence[str]) -> str:
    """The grammar of exactly one of these texts.

    Raises GrammarInvalid if there is none.
    """
    if isinstance(options, str) or not options:
        raise GrammarInvalid(f"choice needs a list with at least one text, got {options!r}")
    return f"start: {' | '.join(map(_dump, options))}\n"


def lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, whose first rule is `start`."""
    return _dump({"grammars": [{"lark_grammar": text}]})


def tool_calls(tools: ToolSet, *, required: bool = False, parallel: bool = True) -> str:
    """The grammar of an assistant's turn in the default tool format (see `agentrt.tool_prompt`).

    Free text, which may end at any point; once it holds `<tool_call>` only calls of these tools
    follow, one or, if `parallel`, several. If `required` the turn starts with a call.

    Raises GrammarInvalid without tools.
    """
    if not tools:
        raise GrammarInvalid("tool_calls needs at least one tool")
    body = {"x-guidance": _JSON_LAYOUT, "anyOf": [_call_schema(each) for each in tools]}
    text = _text_without(OPEN_TAG)
    opening = f"{OPEN_TAG}\n"
    more = f"({_dump(chr(10) + opening)} call){{0,{MAX_CALLS - 1}}}" if parallel else ""
    start = f"{_dump(opening)} calls" if required else "TEXT | TEXT_AND_TAG calls"
    # Text and tag are one terminal: the lexer is greedy, so a text followed by a tag as two
    # terminals would never leave the text.
    terminals = "" if required else f"TEXT: /{text}/\nTEXT_AND_TAG: /{text}{opening[:-1]}\\n/\n"
    return (
        f"start: {start}\ncalls: call {more}\ncall: body {_dump(chr(10) + CLOSE_TAG)}\n"
        f"body: %json {_dump(body)}\n{terminals}"
    )


def text_without_calls() -> str:
    """The grammar of a turn that answers in plain text, where tools could be called otherwise.

    Such an answer does not begin with `<`: SmolLM2-135M, kept from `<tool_call>` alone, began 12
    answers of 12 with a call in a form of its own, such as `<tool_call_2>`.
    """
    return f"start: TEXT\nTEXT: /[^<\\s]{_text_without(OPEN_TAG)}/\n"


def _call_schema(tool: Tool) -> dict[str, Any]:
    properties = {"name": {"const": tool.name}, "arguments": _bounded(tool.parameters)}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _bounded(schema: Any) -> Any:
    """The schema with a bound on each text, list, map and integer that has none."""
    if not isinstance(schema, Mapping):
        return schema
    bounded = {key: _bounded_keyword(key, value) for key, value in schema.items()}
    if "enum" in bounded or "const" in bounded:
        return bounded
    kinds = bounded.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if "string" in kinds and not {"pattern", "format"} & set(bounded):
        bounded.setdefault("maxLength", max(MAX_STRING_CHARACTERS, bounded.get("minLength", 0)))
    if "array" in kinds:
        bounded.setdefault("maxItems", max(MAX_ITEMS, bounded.get("minItems", 0)))
    if "integer" in kinds and "number" not in kinds:
        _bound_integer(bounded)
    if "object" in kinds:
        _bound_map(bounded)
    return bounded


def _bounded_keyword(key: str, value: Any) -> Any:
    if key in ("properties", "patternProperties", "$defs", "definitions"):
        return {name: _bounded(inner) for name, inner in value.items()}
    if key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        return [_bounded(inner) for inner in value]
    return _bounded(value) if key in ("items", "additionalProperties") else value


def _bound_integer(schema: dict[str, Any]) -> None:
    bounds = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    if any(abs(schema.get(bound, 0)) >= MAX_INTEGER for bound in bounds):
        return  # the author wants larger numbers
    if not {"minimum", "exclusiveMinimum"} & set(schema):
        schema["minimum"] = -MAX_INTEGER
    if not {"maximum", "exclusiveMaximum"} & set(schema):
        schema["maximum"] = MAX_INTEGER


def _bound_map(schema: dict[str, Any]) -> None:
    values = schema.get("additionalProperties", True)
    if values is False or schema.get("properties") or "patternProperties" in schema:
        return  # llguidance bounds the number of properties of pure maps only
    schema["patternProperties"] = {f"^.{{1,{MAX_KEY_CHARACTERS}}}$": values}
    schema["additionalProperties"] = False
    schema.setdefault("maxProperties", max(MAX_ITEMS, schema.get("minProperties", 0)))


def _text_without(tag: str) -> str:
    """A regex of all texts that do not hold the tag, whose first character occurs in it only once.

    Written out as the automaton that it is: with llguidance's `~` operator the slices do not apply,
    and the first mask of a turn takes ten times as long.
    """
    first, rest = tag[0], tag[1:]
    begun = ""  # a start of the tag, after its first character
    broken = f"[^{rest[-1]}{first}]"  # ... and then a character that is not the tag's next
    for character in reversed(rest[:-1]):
        begun = f"(?:{character}{begun})?"
        broken = f"(?:[^{character}{first}]|{character}{broken})"
    starts = f"(?:{first}{begun})*"
    return f"(?:[^{first}]|{starts}{first}{broken})*{starts}"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _escape_slashes(pattern: str) -> str:
    from llguidance import regex_to_lark

    return regex_to_lark(pattern, "d")


class GrammarCompiler:
    """Compiles grammars for one tokenizer; the tokenizer's tables are built at first use (0.3 s).

    `vocab_size` is the model's, which may be padded beyond the tokenizer's: a padding id is never
    allowed. The end-of-turn ids are allowed wherever the grammar may end.
    """

    # State: _prototypes, matchers that have taken no token, least recently used first, under _lock,
    # since engines compile in worker threads. Copies of a matcher share its lexer's states, so the
    # masks of a known grammar are warm: 15 us on average in a call, not 28.

    def __init__(
        self, tokenizer_backend: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._backend = tokenizer_backend
        self._eos_token_ids = frozenset(eos_token_ids)
        self._lock = threading.Lock()
        self._prototypes: OrderedDict[str, LLMatcher] = OrderedDict()
        self.vocab_size = vocab_size

    @property
    def num_mask_words(self) -> int:
        """The length of a mask row: one int32 for each 32 tokens."""
        return (self.vocab_size + 31) // 32

    def compile(self, grammar: str) -> Constraint:
        """A fresh constraint.

        Raises GrammarInvalid with llguidance's message if it is no grammar, and ModelUnsupported
        if llguidance does not know the tokenizer's kind.
        """
        with self._lock:
            matcher = self._prototype(grammar).deep_copy()
        return Constraint(matcher, self.num_mask_words, self._eos_token_ids)

    def _prototype(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        prototype = self._prototypes.pop(grammar, None)
        if prototype is None:
            prototype = LLMatcher(self._tokenizer, grammar, log_level=0)
            if prototype.is_error():
                raise GrammarInvalid(f"the grammar cannot be compiled: {prototype.get_error()}")
        self._prototypes[grammar] = prototype
        if len(self._prototypes) > _MAX_PROTOTYPES:
            self._prototypes.popitem(last=False)
        return prototype

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(self._backend.to_str())
        backend.no_padding()
        backend.no_truncation()
        slices = [*LLTokenizer.json_slices(), _FREE_TEXT_SLICE]
        try:
            return LLTokenizer(
                backend.to_str(),
                n_vocab=self.vocab_size,
                eos_token=sorted(self._eos_token_ids),
                slices=slices,
            )
        except ValueError as exc:
            raise ModelUnsupported(f"grammars cannot be used with this tokenizer: {exc}") from exc


class Constraint:
    """One generation's place in its grammar. Use it from one thread at a time."""

    # State: the matcher's place; _num_tokens, how many tokens led there; _has_end, whether the last
    # of them is an end-of-turn token that the matcher does not count. It counts one where more text
    # could follow, and stops by itself, refusing any token, where none can.

    def __init__(
        self, matcher: LLMatcher, num_mask_words: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._matcher = matcher
        self._num_mask_words = num_mask_words
        self._eos_token_ids = eos_token_ids
        self._num_tokens = 0
        self._has_end = False

    def __repr__(self) -> str:
        return f"<Constraint tokens={self._num_tokens} is_finished={self.is_finished}>"

    def mask(self) -> NDArray[np.int32]:
        """Which tokens may come next, in a new row (see `fill_mask`)."""
        import numpy as np

        row = np.zeros(self._num_mask_words, dtype=np.int32)
        self.fill_mask(row)
        return row

    def fill_mask(self, row: NDArray[np.int32]) -> None:
        """Writes which tokens may come next: bit `i % 32` of word `i // 32` is token i.

        Where the grammar leaves one text only, that is the one token with which the tokenizer
        would write it, though `accept` also takes other ways to spell that text.

        Raises GrammarInvalid if the grammar turns out too complex to follow.
        """
        assert row.dtype == "int32", row.dtype
        assert row.shape == (self._num_mask_words,), row.shape
        assert row.flags.c_contiguous
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        self._check_matcher()

    def accept(self, token_id: int) -> bool:
        """Moves on by one token; False, and no move, if it is not allowed here."""
        if self._matcher.try_consume_tokens([token_id]) != 1:
            self._check_matcher()
            if token_id not in self._eos_token_ids or self._has_end or not self._stopped_itself():
                return False
            self._has_end = True
        self._num_tokens += 1
        return True

    def _stopped_itself(self) -> bool:
        return self.is_finished and bool(self._matcher.stop_reason() != "EndOfSentence")

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing but the end of the turn may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """Whether the turn may end here."""
        return bool(self._matcher.is_accepting())

    def rollback(self, num_tokens: int) -> None:
        """Takes the last tokens back, an end-of-turn token too."""
        assert 0 <= num_tokens <= self._num_tokens, (num_tokens, self._num_tokens)
        if num_tokens:
            self._matcher.rollback(num_tokens - self._has_end)
            self._has_end = False
        self._num_tokens -= num_tokens
        self._check_matcher()

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write that text; often none."""
        return [] if self.is_finished else list(self._matcher.compute_ff_tokens())

    def fork(self) -> Constraint:
        """A copy that goes its own way."""
        copy = Constraint(self._matcher.deep_copy(), self._num_mask_words, self._eos_token_ids)
        copy._num_tokens, copy._has_end = self._num_tokens, self._has_end
        return copy

    def _check_matcher(self) -> None:
        if self._matcher.is_error():
            raise GrammarInvalid(f"the grammar cannot be followed: {self._matcher.get_error()}")
