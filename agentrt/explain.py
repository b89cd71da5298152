"""Why a request's prefix was found, or not: facts noted at admission, and their reading."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define, evolve, field, frozen

from agentrt.cache.keys import chunk_keys
from agentrt.types import TierName

if TYPE_CHECKING:
    from agentrt.cache.node import TokenArray

# Other dtype, kernels, KV layout or processor: what they stored has other bits.
Elsewhere = Literal["namespace", "new model digest", "new settings or machine"]
Cause = (
    Literal[
        "nothing is missing",
        "new text",
        "template rewrite",
        "clock in the prompt",
        "another text",
        "evicted",
    ]
    | Elsewhere
)

MAX_ADMISSIONS = 1024
MAX_SEEN_CHUNKS = 1 << 16
CHUNK_TOKENS = 64  # of the keys of what was computed; not the chunks of the tiers
SHOWN_TOKENS = 24  # of the text around the first difference
# A date, a time of day, a Unix time: what a clock writes into a prompt.
_CLOCK = re.compile(r"\d{4}-\d\d-\d\d|\d{1,2}:\d\d|\b1\d{9}\b|\d{1,2}/\d{1,2}/\d{2,4}")


@frozen(kw_only=True)
class Explanation:
    """What `Engine.explain` tells of one request.

    `first_difference` is the first prompt token that no tier had; `text` is what the prompt says
    there and `other_text` what the nearest stored prefix says instead, if it goes on otherwise.
    """

    request_id: str
    prompt_tokens: int
    matched_tokens: Mapping[TierName, int]
    computed_tokens: int
    first_difference: int | None
    text: str | None
    other_text: str | None
    cause: Cause


@frozen(kw_only=True)
class Admission:
    """What was so when a request was admitted. `other` are the tokens with which the tree goes on
    where the prompt leaves it."""

    token_ids: TokenArray
    matched_tokens: dict[TierName, int]
    other: TokenArray
    is_rewritten: bool  # whether the caller said that it rewrites an earlier prompt
    was_seen: bool = False  # whether the next tokens were computed here before

    @property
    def num_matched(self) -> int:
        return sum(self.matched_tokens.values())


@define
class Admissions:
    """Owned by the step thread: the last admissions, and the keys of chunks that were computed.

    Both are bounded, the oldest forgotten first. `_noted` are those, with how many of their tokens
    were found, whose keys nobody has made yet: a request need not wait for that.
    """

    _by_id: OrderedDict[str, Admission] = field(factory=OrderedDict)
    _seen: OrderedDict[bytes, None] = field(factory=OrderedDict)
    _noted: list[tuple[str, Admission, int]] = field(factory=list)

    def note(self, request_id: str, admission: Admission, num_matched: int) -> None:
        """Keep an admission that found its first `num_matched` tokens, and take its prompt for
        computed."""
        self._noted.append((request_id, admission, num_matched))

    def catch_up(self) -> None:
        """Learn from those that were noted since the last call, in their order."""
        noted, self._noted = self._noted, []
        for request_id, admission, num_matched in noted:
            keys = chunk_keys(admission.token_ids, CHUNK_TOKENS)
            behind = num_matched // CHUNK_TOKENS  # the chunk that holds the first missing token
            was_seen = behind < len(keys) and keys[behind] in self._seen
            self._by_id[request_id] = evolve(admission, was_seen=was_seen)
            for key in keys:
                self._seen[key] = None
                self._seen.move_to_end(key)
        while len(self._by_id) > MAX_ADMISSIONS:
            self._by_id.popitem(last=False)
        while len(self._seen) > MAX_SEEN_CHUNKS:
            self._seen.popitem(last=False)

    def get(self, request_id: str) -> Admission | None:
        self.catch_up()
        return self._by_id.get(request_id)


def explain(
    request_id: str,
    admission: Admission,
    decode: Callable[[TokenArray], str],
    elsewhere: Elsewhere | None,
) -> Explanation:
    """Read the facts. `elsewhere` says where else the disk has the prompt's beginning."""
    position = admission.num_matched
    prompt = admission.token_ids
    is_whole = position >= len(prompt) - 1  # the last token is always computed
    begin = max(0, position - SHOWN_TOKENS // 2)
    text = None if is_whole else decode(prompt[begin : position + SHOWN_TOKENS])
    other_text = None
    if not is_whole and len(admission.other):
        joined = np.concatenate((prompt[begin:position], admission.other[:SHOWN_TOKENS]))
        other_text = decode(joined)
    return Explanation(
        request_id=request_id,
        prompt_tokens=len(prompt),
        matched_tokens=dict(admission.matched_tokens),
        computed_tokens=len(prompt) - position,
        first_difference=None if is_whole else position,
        text=text,
        other_text=other_text,
        cause="nothing is missing" if is_whole else _cause(admission, text, other_text, elsewhere),
    )


def _cause(
    admission: Admission,
    text: str | None,
    other_text: str | None,
    elsewhere: Elsewhere | None,
) -> Cause:
    if admission.is_rewritten:
        return "template rewrite"
    if admission.was_seen:
        return "evicted"
    if other_text is not None and text is not None:
        return "clock in the prompt" if _clocks(text) != _clocks(other_text) else "another text"
    if elsewhere is not None and not admission.num_matched:
        return elsewhere
    return "new text"


def _clocks(text: str) -> list[str]:
    return _CLOCK.findall(text)
