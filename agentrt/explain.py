"""Why a request's prefix was found, or not: facts noted at admission, and their reading."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
from attrs import define, field, frozen

from agentrt.cache.keys import chunk_key
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
    was_seen: bool  # whether the next tokens were computed here before
    is_rewritten: bool  # whether the caller said that it rewrites an earlier prompt

    @property
    def num_matched(self) -> int:
        return sum(self.matched_tokens.values())


@define
class Admissions:
    """Owned by the step thread: the last admissions, and the keys of chunks that were computed.

    Both are bounded, the oldest forgotten first.
    """

    _by_id: OrderedDict[str, Admission] = field(factory=OrderedDict)
    _seen: OrderedDict[bytes, None] = field(factory=OrderedDict)

    def note(self, request_id: str, admission: Admission) -> None:
        """Keep an admission, and take its prompt for computed."""
        self._by_id[request_id] = admission
        while len(self._by_id) > MAX_ADMISSIONS:
            self._by_id.popitem(last=False)
        for key in _keys(admission.token_ids):
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > MAX_SEEN_CHUNKS:
            self._seen.popitem(last=False)

    def get(self, request_id: str) -> Admission | None:
        return self._by_id.get(request_id)

    def was_seen(self, token_ids: TokenArray, num_matched: int) -> bool:
        """Whether the chunk behind the first `num_matched` tokens was computed before."""
        end = (num_matched // CHUNK_TOKENS + 1) * CHUNK_TOKENS
        if end > len(token_ids):
            return False
        *_, key = _keys(token_ids[:end])
        return key in self._seen


def _keys(token_ids: TokenArray) -> list[bytes]:
    """The chain of keys of whole chunks."""
    keys, parent = [], b""
    for start in range(0, len(token_ids) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        parent = chunk_key(parent, token_ids[start : start + CHUNK_TOKENS])
        keys.append(parent)
    return keys


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
