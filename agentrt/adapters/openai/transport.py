"""An httpx transport that an engine answers: requests go in and events come out as they are made.

ASGITransport collects a whole body before it answers, so that nothing could be streamed through it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import anyio

from agentrt.adapters.openai.answer import EventStream

if TYPE_CHECKING:
    from agentrt.adapters.openai.api import Api


def transport(http: ModuleType, api: Api) -> Any:
    """A transport for `http`, which is httpx or its successor httpx2: they have the same classes,
    and each takes its own alone."""

    class EngineTransport(http.AsyncBaseTransport):  # type: ignore[name-defined]
        """Hands requests to the engine's API. Closing it forgets what the API kept."""

        async def handle_async_request(self, request: Any) -> Any:
            body = await request.aread()
            limit_s = read_limit_s(request)
            with _timed(http, request, limit_s):
                query = request.url.query.decode("ascii")
                answer = await api.answer(request.method, request.url.path, body, query)
            headers = dict(answer.headers)
            if isinstance(answer.body, bytes):
                return http.Response(answer.status, headers=headers, content=answer.body)
            stream = EngineByteStream(request, answer.body, limit_s)
            return http.Response(answer.status, headers=headers, stream=stream)

        async def aclose(self) -> None:
            await api.aclose()

    class EngineByteStream(http.AsyncByteStream):  # type: ignore[name-defined]
        """A body of events. Closing it cancels what is still generated."""

        def __init__(self, request: Any, events: EventStream, limit_s: float | None) -> None:
            self._request, self._events, self._limit_s = request, events, limit_s

        async def __aiter__(self) -> AsyncIterator[bytes]:
            while True:
                with _timed(http, self._request, self._limit_s):
                    chunk = await anext(self._events, None)
                if chunk is None:
                    return
                yield chunk

        async def aclose(self) -> None:
            await self._events.aclose()

    return EngineTransport()


def read_limit_s(request: Any) -> float | None:
    """How long the client waits for the next bytes; None: for ever."""
    limit_s: float | None = request.extensions.get("timeout", {}).get("read")
    return limit_s


class _timed:
    """Raises the client's own error when a block takes longer than the client waits."""

    def __init__(self, http: ModuleType, request: Any, limit_s: float | None) -> None:
        self._http, self._request, self._limit_s = http, request, limit_s
        self._scope = anyio.move_on_after(limit_s)

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, *exc: Any) -> bool:
        is_caught = bool(self._scope.__exit__(*exc))
        if self._scope.cancelled_caught:
            raise self._http.ReadTimeout(
                f"no answer within {self._limit_s} s", request=self._request
            )
        return is_caught
