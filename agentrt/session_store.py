"""Sessions on disk: the messages and the token log of each, one file a session."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from attrs import asdict, define, frozen
from xxhash import xxh3_64_hexdigest

from agentrt.errors import RequestInvalid, SessionBusy, TierUnavailable
from agentrt.types import Message, ToolCall

FORMAT = 1


@frozen(kw_only=True)
class SavedSession:
    """All that a session needs to go on. `ids` and what follows hold for one model only."""

    messages: tuple[Message, ...]
    num_calls: int
    model_digest: str
    ids: tuple[int, ...]
    text: str
    marks: tuple[tuple[int, int], ...]


@frozen
class SessionStore:
    """Files in one folder. A file is replaced whole: after a crash it is the old or the new one.

    All methods do I/O: call them in a worker thread.
    """

    folder: Path
    namespace: str

    def load(self, session_id: str) -> SavedSession | None:
        """The session, or None if none was saved. Raises RequestInvalid if its file is damaged."""
        path = self._path(session_id)
        try:
            lines = path.read_bytes()
        except FileNotFoundError:
            return None
        checksum, _, body = lines.partition(b"\n")
        if checksum.decode(errors="replace") != xxh3_64_hexdigest(body):
            raise RequestInvalid(
                f"session {session_id!r}: {path} is damaged: remove it, or choose another id"
            )
        return _decode(json.loads(body))

    def save(self, session_id: str, session: SavedSession) -> None:
        """Replace the session's file. Raises TierUnavailable where that cannot be written."""
        body = json.dumps({"format": FORMAT, "id": session_id, **asdict(session)}).encode()
        path = self._path(session_id)
        fresh = path.with_suffix(".new")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(xxh3_64_hexdigest(body).encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except OSError as exc:
            raise TierUnavailable(
                f"session {session_id!r} cannot be saved in {self.folder}: {exc}: make the folder "
                "writable, or leave the session's id out"
            ) from exc

    def erase(self, session_id: str) -> None:
        """Overwrite the session's file and remove it."""
        path = self._path(session_id)
        if path.exists():
            with open(path, "r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()

    def _path(self, session_id: str) -> Path:
        name = hashlib.sha256(f"{len(self.namespace)}:{self.namespace}{session_id}".encode())
        return self.folder / f"{name.hexdigest()[:32]}.json"


@define
class SessionFile:
    """One session's place in a store, for one model. `open_ids` are those in use in this engine."""

    store: SessionStore
    session_id: str
    model_digest: str
    open_ids: set[str]

    def claim(self) -> None:
        """Raises SessionBusy if the session is open already."""
        if self.session_id in self.open_ids:
            raise SessionBusy(f"session {self.session_id!r} is open already: close that one first")
        self.open_ids.add(self.session_id)

    def release(self) -> None:
        self.open_ids.discard(self.session_id)

    def load(self) -> SavedSession | None:
        return self.store.load(self.session_id)

    def save(self, session: SavedSession) -> None:
        self.store.save(self.session_id, session)

    def erase(self) -> None:
        self.store.erase(self.session_id)


def _decode(values: dict[str, Any]) -> SavedSession:
    messages = [
        Message(**{**m, "tool_calls": tuple(ToolCall(**call) for call in m["tool_calls"])})
        for m in values["messages"]
    ]
    return SavedSession(
        messages=tuple(messages),
        num_calls=values["num_calls"],
        model_digest=values["model_digest"],
        ids=tuple(values["ids"]),
        text=values["text"],
        marks=tuple((text, ids) for text, ids in values["marks"]),
    )
