"""The append-only token log of a session, and the text that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from attrs import define, field

from agentrt.errors import RequestInvalid

if TYPE_CHECKING:
    from agentrt.tokenizer import Tokenizer

# Noncharacters of Unicode: they mark special-token text that came from outside the template.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
# Text up to this length takes about 2 ms to encode; more must not hold the event loop up.
INLINE_CHARACTERS = 4096
_GUARDED = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)


def guard(text: str, special_tokens: Iterable[str]) -> str:
    """Mark every special token's text inside a message, so that it is encoded as text.

    The marks themselves become U+FFFD: in a message they could end or join marked parts.
    """
    text = text.replace(_OPEN, "\ufffd").replace(_CLOSE, "\ufffd")
    present = [token for token in special_tokens if token in text]
    if not present:
        return text
    pattern = "|".join(re.escape(token) for token in sorted(present, key=len, reverse=True))
    return re.sub(pattern, lambda match: f"{_OPEN}{match[0]}{_CLOSE}", text)


def check_text(text: object) -> str:
    """The text; RequestInvalid for what no tokenizer takes: another type, or lone surrogates."""
    if not isinstance(text, str):
        raise RequestInvalid(f"text must be str, got {type(text).__name__}: decode bytes as UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise RequestInvalid(f"the text is not valid Unicode: {exc}") from exc
    return text


def encode_guarded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encode rendered text: the template's special tokens are tokens, guarded ones are text."""
    ids: list[int] = []
    for index, piece in enumerate(_GUARDED.split(text)):
        ids += tokenizer.encode(piece, allow_special=index % 2 == 0) if piece else []
    return ids


@define
class TokenLog:
    """Ids that the model read or wrote, and the rendered text that they stand for.

    Invariant: ids are only ever appended, except where the template rewrites history: then the
    log is cut back to the last append that lies within the common text, and `rewrites` grows.
    """

    tokenizer: Tokenizer
    ids: list[int] = field(factory=list)
    text: str = ""
    rewrites: int = 0
    _marks: list[tuple[int, int]] = field(factory=lambda: [(0, 0)])  # (text, ids) after each append

    def update(self, rendered: str) -> None:
        """Make the log stand for `rendered`, keeping every token of the common beginning."""
        if not rendered.startswith(self.text):
            from agentrt.template import stable_prefix  # loads jinja2: not at import of a session

            self._cut(stable_prefix(rendered, self.text))
            self.rewrites += 1
        new = rendered[len(self.text) :]
        if new:
            self._append(encode_guarded(new, self.tokenizer), new)

    def append_generated(self, ids: Sequence[int], text: str) -> None:
        """Take generated ids as they are, and the text that templates will show for them."""
        self._append(ids, text)

    @property
    def marks(self) -> tuple[tuple[int, int], ...]:
        """(characters, ids) after each append."""
        return tuple(self._marks)

    def restore(self, ids: Sequence[int], text: str, marks: Iterable[tuple[int, int]]) -> None:
        """Become the log that these were read from."""
        self.ids, self.text, self._marks = list(ids), text, list(marks)

    def copy(self) -> TokenLog:
        """An equal log that goes its own way."""
        return TokenLog(self.tokenizer, list(self.ids), self.text, self.rewrites, list(self._marks))

    def _append(self, ids: Sequence[int], text: str) -> None:
        self.ids += ids
        self.text += text
        self._marks.append((len(self.text), len(self.ids)))

    def _cut(self, num_characters: int) -> None:
        while self._marks[-1][0] > num_characters:
            self._marks.pop()
        num_characters, num_ids = self._marks[-1]
        self.text = self.text[:num_characters]
        del self.ids[num_ids:]
