"""How a text is brought to the end that its grammar wants, before the tokens run out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

_CLOSERS = frozenset("\"'}])>\n ")
_SEPARATORS = frozenset(",: ")
_SHORT_TOKENS = 48  # of most ways
_FIRST_TOKENS = 1024  # of an order: what closes and separates, and some of the rest


def closing_order(backend: Tokenizer, vocab_size: int) -> NDArray[np.int32]:
    """All tokens, those first that are likely to bring a text to its end: what closes, the longest
    first; what separates; then the shortest. The second row has what begins with a quote before the
    rest: a text of the first may go on within a string for ever, one of the second may open one
    object after the other.

    Returns [2, tokens].
    """
    import numpy as np

    num_tokens = min(vocab_size, backend.get_vocab_size())
    ids = [[token] for token in range(num_tokens)]
    texts = backend.decode_batch(ids, skip_special_tokens=False)
    lengths = np.fromiter(map(len, texts), np.int64, num_tokens)
    kinds = np.fromiter(map(_kind, texts), np.int64, num_tokens)
    is_quoted = np.fromiter((text[:1] == '"' for text in texts), np.bool_, num_tokens)
    sizes = np.where(kinds == 0, -lengths, lengths)
    is_rest = (kinds > 0) | ~is_quoted
    orders = [np.lexsort(keys) for keys in ((sizes, kinds), (sizes, kinds, is_rest))]
    return np.stack(orders).astype(np.int32)


def _kind(text: str) -> int:
    """0 for what closes, 1 for what separates, 2 for the rest."""
    if text[:1] not in _CLOSERS and text[:1] not in _SEPARATORS:  # most; also the empty one
        return 2
    return 0 if _CLOSERS.issuperset(text) else 1 if _SEPARATORS.issuperset(text) else 2


def way_to_end(
    matcher: LLMatcher, orders: NDArray[np.int32], num_words: int, most_tokens: int
) -> list[int] | None:
    """Tokens that complete the text from here, as few as is easily found; None where that takes
    more than `most_tokens`. `orders` are those of `closing_order`: a short way by any of them is
    looked for first."""
    for limit in sorted({min(_SHORT_TOKENS, most_tokens), most_tokens}):
        for order in orders:
            way = _way_by(matcher, order, num_words, limit)
            if way is not None:
                return way
    return None


def _way_by(
    matcher: LLMatcher, order: NDArray[np.int32], num_words: int, most_tokens: int
) -> list[int] | None:
    import numpy as np

    matcher, way = matcher.deep_copy(), list[int]()
    row = np.zeros(num_words, dtype=np.int32)
    while not matcher.is_accepting():
        more = list(matcher.compute_ff_tokens())
        if not more:
            matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            more = [_first_allowed(row, order)]
        if len(way) + len(more) > most_tokens or matcher.try_consume_tokens(more) != len(more):
            return None
        way += more
    return way


def _first_allowed(row: NDArray[np.int32], order: NDArray[np.int32]) -> int:
    """The first token of the order that a mask allows: mostly one of the first few, so that a look
    at all takes longer than all else that a way does."""
    for part in (order[:_FIRST_TOKENS], order):
        is_allowed = row[part >> 5] >> (part & 31) & 1
        place = is_allowed.argmax()
        if is_allowed[place]:
            break
    return int(part[place])


@define
class Ending:
    """Keeps a text such that it can be completed within `max_tokens`.

    State: `way`, tokens that complete the text from where its grammar stands, None where it cannot
    be told; `is_near`, whether nothing else may follow any more. Invariant: a way that was known
    at the first token is known, and not longer than the tokens that are left, until the text ends.
    """

    max_tokens: int
    orders: NDArray[np.int32] = field(repr=False)  # [2, tokens], see `closing_order`
    eos_token_id: int
    way: list[int] | None = None
    is_near: bool = False
    is_lost: bool = False

    def begin(self, matcher: LLMatcher, num_words: int) -> None:
        """Find the way from a text's first token."""
        self.way = way_to_end(matcher, self.orders, num_words, self.max_tokens)
        self.is_lost = self.way is None

    def token(self, matcher: LLMatcher, token_id: int, num_left: int, num_words: int) -> int:
        """The token to take of `num_left`: this one, or, where the text could not be completed
        behind it, the next on the way."""
        if self.is_lost or token_id == self.eos_token_id:
            return token_id
        assert self.way is not None
        if not self.is_near:
            after = self._way_behind(matcher, token_id, num_left - 1, num_words)
            if after is not None:
                self.way = after
                return token_id
            self.is_near = True
        if not self.way:
            return self.eos_token_id
        token_id, self.way = self.way[0], self.way[1:]
        return token_id

    def _way_behind(
        self, matcher: LLMatcher, token_id: int, num_left: int, num_words: int
    ) -> list[int] | None:
        assert self.way is not None
        if self.way and token_id == self.way[0]:
            return self.way[1:]
        behind = matcher.deep_copy()
        if behind.try_consume_tokens([token_id]) != 1:
            return self.way  # not allowed here: for the caller to find out
        # mostly a text goes on, and what closes it is what closed it before
        if len(self.way) <= num_left and _completes(behind, self.way):
            return self.way
        return way_to_end(behind, self.orders, num_words, num_left)


def _completes(matcher: LLMatcher, way: list[int]) -> bool:
    matcher = matcher.deep_copy()
    return bool(matcher.try_consume_tokens(way) == len(way) and matcher.is_accepting())
