"""Constrained decoding over llguidance: grammars as text, and the token masks they allow.

The functions at the top build text for `GenerateOptions.grammar`; they do no work and no I/O.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from attrs import evolve

from agentrt.errors import GrammarInvalid, ModelUnsupported
from agentrt.grammar_ending import Ending, closing_order
from agentrt.grammar_schemas import exact_schema, has_merged_objects, has_one_of

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLExecutor, LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    MaskRow = NDArray[np.int32]  # bit `i % 32` of word `i // 32` is token i

# A tiny model repeats itself without end wherever a grammar lets it. These bounds hold where the
# tool's schema sets none; they are far above what a call needs.
MAX_STRING_CHARACTERS = 256
MAX_KEY_CHARACTERS = 64
MAX_ITEMS = 16
MAX_INTEGER = 10**18  # llguidance handles bounds as float64 and fails just below 2**63

# The one way that json.dumps prints; llguidance's default, any white space anywhere, is one more
# thing to repeat without end.
_JSON_LAYOUT = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

JSON_LAYOUT = {"x-guidance": _JSON_LAYOUT}

# Slices are sets of tokens that llguidance allows in one go where the state admits them all. The
# last one is for free text: with it a turn's first mask takes 0.1 ms, not 1 ms (49,152 tokens).
_FREE_TEXT_SLICE = "[^<>]+"
_MAX_PROTOTYPES = 64  # compiled grammars that are kept; a session asks for the same one every turn


def json_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of one JSON value that fits the schema, laid out as `json.dumps` does.

    Raises GrammarInvalid where the schema has what no grammar here can hold.
    """
    return f"start: {json_value(schema)}\n"


def json_value(schema: Mapping[str, Any]) -> str:
    """The same, as the right side of a rule of a Lark grammar."""
    return exact_json_value(exact_schema(schema))


def exact_json_value(schema: Mapping[str, Any]) -> str:
    """The same, of a schema that `exact_schema` has made."""
    return f"%json {quoted({**JSON_LAYOUT, **schema})}"


def regex(pattern: str) -> str:
    """The grammar of a text that matches the whole pattern (Rust's regex syntax)."""
    return quoted({"grammars": [{"lark_grammar": f"start: /{_escape_slashes(pattern)}/\n"}]})


def choice(options: Sequence[str]) -> str:
    """The grammar of exactly one of these texts.

    Raises GrammarInvalid if there is none.
    """
    if isinstance(options, str) or not options:
        raise GrammarInvalid(f"choice needs a list with at least one text, got {options!r}")
    return f"start: {' | '.join(map(quoted, options))}\n"


def lark(text: str) -> str:
    """A grammar in llguidance's dialect of Lark, whose first rule is `start`."""
    return quoted({"grammars": [{"lark_grammar": text}]})


def bounded(schema: Any) -> Any:
    """The schema with a bound on each text, list, map and integer that has none. An object that
    names its properties, and says nothing of others, has none, where that is all there is to it:
    where one text is weighed against several schemas it stays as it is."""
    is_open = isinstance(schema, Mapping) and (has_merged_objects(schema) or has_one_of(schema))
    return _bounded(schema, is_closed=not is_open)


def _bounded(schema: Any, *, is_closed: bool) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    change = partial(_bounded, is_closed=is_closed)
    made = {key: _within(key, value, change) for key, value in schema.items()}
    if is_closed and made.get("properties"):
        made.setdefault("additionalProperties", False)
    if "enum" in made or "const" in made:
        return made
    kinds = made.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    if "string" in kinds and not {"pattern", "format"} & set(made):
        made.setdefault("maxLength", max(MAX_STRING_CHARACTERS, made.get("minLength", 0)))
    if "array" in kinds:
        made.setdefault("maxItems", max(MAX_ITEMS, made.get("minItems", 0)))
    if "integer" in kinds and "number" not in kinds:
        _bound_integer(made)
    if "object" in kinds:
        _bound_map(made)
    return made


def _within(key: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """A keyword's value, with each schema in it changed. What is no schema stays: llguidance says
    so."""
    if key in ("properties", "patternProperties", "$defs", "definitions"):
        is_map = isinstance(value, Mapping)
        return {name: change(inner) for name, inner in value.items()} if is_map else value
    if key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        return [change(inner) for inner in value] if isinstance(value, list | tuple) else value
    return change(value) if key in ("items", "additionalProperties") else value


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
    schema["patternProperties"] = {f"^[^\n]{{1,{MAX_KEY_CHARACTERS}}}$": values}
    schema["additionalProperties"] = False
    schema.setdefault("maxProperties", max(MAX_ITEMS, schema.get("minProperties", 0)))


def quoted(value: Any) -> str:
    """A value as JSON; of a text, the form that a literal has in Lark."""
    # llguidance's lexer refuses a bare DEL, the one character that JSON leaves as it is and it does
    # not take.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


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

    def compile(self, grammar: str, max_tokens: int | None = None) -> Constraint:
        """A fresh constraint. With `max_tokens` what it takes (`take`) is complete by then, if
        that many can be enough.

        Raises GrammarInvalid with llguidance's message if it is no grammar, and ModelUnsupported
        if llguidance does not know the tokenizer's kind.
        """
        with self._lock:
            matcher = self._prototype(grammar).deep_copy()
            order = None if max_tokens is None else self._closing_order
        constraint = Constraint(matcher, self.num_mask_words, self._eos_token_ids)
        if max_tokens is not None and order is not None:
            constraint.end_within(Ending(max_tokens, order, min(self._eos_token_ids)))
        return constraint

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
    def _closing_order(self) -> NDArray[np.int32]:
        return closing_order(self._backend, self.vocab_size)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer
        from tokenizers import Tokenizer

        backend = self._backend
        if backend.padding is not None or backend.truncation is not None:
            backend = Tokenizer.from_str(backend.to_str())  # 0.2 s, of 0.7 in all
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
        self._ending: Ending | None = None

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

    def end_within(self, ending: Ending) -> None:
        """Complete the text within the ending's tokens, from the first on."""
        assert not self._num_tokens
        ending.begin(self._matcher, self._num_mask_words)
        self._ending = ending

    def take(self, token_id: int) -> int:
        """Moves on by this token, which is allowed here, or by the one that must come instead where
        few are left; says by which."""
        if self._ending is not None and not self.is_finished:
            num_left = self._ending.max_tokens - self._num_tokens
            token_id = self._ending.token(self._matcher, token_id, num_left, self._num_mask_words)
        self.accept(token_id)
        return token_id

    @property
    def is_cut_short(self) -> bool:
        """Whether the text was brought to an end that the model did not write."""
        return self._ending is not None and self._ending.is_near

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
        assert self._ending is None or not num_tokens, "what is kept completable is not taken back"
        if num_tokens:
            self._matcher.rollback(num_tokens - self._has_end)
            self._has_end = False
        self._num_tokens -= num_tokens
        self._check_matcher()

    def forced_tokens(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would write that text; often none."""
        if self.is_finished:
            return []
        if self._ending is not None and self._ending.is_near:
            return list(self._ending.way or ())
        return list(self._matcher.compute_ff_tokens())

    def num_allowed(self, token_ids: list[int]) -> int:
        """How many of these tokens may come, one after the other."""
        return 0 if self.is_finished else int(self._matcher.validate_tokens(token_ids))

    def fork(self) -> Constraint:
        """A copy that goes its own way."""
        copy = Constraint(self._matcher.deep_copy(), self._num_mask_words, self._eos_token_ids)
        copy._num_tokens, copy._has_end = self._num_tokens, self._has_end
        copy._ending = None if self._ending is None else evolve(self._ending)
        return copy

    def _check_matcher(self) -> None:
        if self._matcher.is_error():
            raise GrammarInvalid(f"the grammar cannot be followed: {self._matcher.get_error()}")


def fill_masks(
    executor: LLExecutor, asked: Sequence[tuple[Constraint | None, list[int]]]
) -> list[MaskRow | None]:
    """The masks at each of these places, and behind each token of the draft that follows there;
    None where there is no grammar, or where it lets the draft not come to.

    Changes no place. A grammar that cannot be followed is found out by whoever uses it next.
    """
    import numpy as np

    num_words = next(each._num_mask_words for each, _ in asked if each is not None)
    firsts = np.cumsum([0, *(1 + len(draft) for _, draft in asked)]).tolist()
    words = np.zeros((firsts[-1], num_words), dtype=np.int32)
    places = [
        (constraint._matcher, first, draft)
        for (constraint, draft), first in zip(asked, firsts[:-1], strict=True)
        if constraint is not None
    ]
    where = (words.ctypes.data, 4 * num_words, len(words))
    if plain := [(matcher, first) for matcher, first, draft in places if not draft]:
        executor.unsafe_compute_mask_ptr(plain, *where)
    if drafted := [place for place in places if place[2]]:
        executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
    return [row if row.any() else None for row in words]
