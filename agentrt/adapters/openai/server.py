"""The API as an ASGI application: for a port, where other programs are to reach the engine."""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio
from attrs import define, field
from starlette.requests import ClientDisconnect, Request

from agentrt.adapters.openai.answer import Answer, refused
from agentrt.adapters.openai.api import Api
from agentrt.adapters.openai.refusal import FAILED, OVERLOADED, Refusal

MOST_BODY_BYTES = 8 << 20
MOST_REQUESTS = 256
MOST_BODY_S = 60.0  # from the headers to the end of the body
DROPPED_BODIES = 8  # as many times the longest body is read before the connection is closed
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_logger = logging.getLogger(__name__)


@define(eq=False, kw_only=True)
class Application:
    """Answers HTTP. A client that leaves cancels its request in the engine.

    State: how many requests are being answered, `most_requests` at most. With a `token` each one
    must bear it. Without one only programs of this machine are served, and no web page: a browser
    sends what any page tells it to, also to names that were made to lead here.
    """

    api: Api
    token: str | None = None
    most_body_bytes: int = MOST_BODY_BYTES
    most_requests: int = MOST_REQUESTS
    _num_requests: int = field(default=0, init=False)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"no {scope['type']} here, only http")
        if self._num_requests >= self.most_requests:
            limit = f"{self._num_requests} requests are being answered, the limit: try again later"
            busy = Refusal(limit, code="overloaded", status=429, kind=OVERLOADED)
            await _send(refused(busy), send)
            return
        self._num_requests += 1
        try:
            await self._serve(Request(scope, receive), receive, send)
        except ClientDisconnect:
            pass  # nobody is left to tell
        finally:
            self._num_requests -= 1

    async def _serve(self, request: Request, receive: Receive, send: Send) -> None:
        try:
            self._check_caller(request)
            body = await self._body(request)
        except Refusal as refusal:
            await _send(refused(refusal), send)
            return
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when_left, receive, group.cancel_scope)
            await _send(await self._answer(request, body), send)
            group.cancel_scope.cancel()

    async def _answer(self, request: Request, body: bytes) -> Answer:
        try:
            url = request.url
            return await self.api.answer(request.method, url.path, body, url.query)
        except Exception:
            _logger.exception("a request failed for a reason that it should not have")
            failed = Refusal("the server failed; its log says why", status=500, kind=FAILED)
            return refused(failed)

    def _check_caller(self, request: Request) -> None:
        if self.token is not None:
            kind, _, given = request.headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self.token.encode())
            if kind.lower() != "bearer" or not is_right:
                raise Refusal("a bearer token is needed", code="invalid_api_key", status=401)
            return
        origin = request.headers.get("origin")
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if not is_loopback(host or "") or origin is not None:
            raise Refusal(
                "without a token this server answers programs of its own machine alone",
                code="forbidden",
                status=403,
            )

    async def _body(self, request: Request) -> bytes:
        """The whole body, in time. What is too long is read on for a while, and dropped: a client
        that still sends when the connection closes would never see why."""
        parts, num_bytes = [], 0
        with anyio.move_on_after(MOST_BODY_S) as limit:
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes <= self.most_body_bytes:
                    parts.append(part)
                elif num_bytes > DROPPED_BODIES * self.most_body_bytes:
                    break
                else:
                    parts.clear()
        if num_bytes > self.most_body_bytes:
            limit_bytes = f"the body has more than {self.most_body_bytes} bytes"
            raise Refusal(limit_bytes, code="request_too_large", status=413)
        if limit.cancelled_caught:
            raise Refusal(f"no body within {MOST_BODY_S} s", code="timeout", status=408)
        return b"".join(parts)


async def _cancel_when_left(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _send(answer: Answer, send: Send) -> None:
    headers = dict(answer.headers)
    if answer.status == 401:
        headers["www-authenticate"] = "Bearer"
    if answer.status in (408, 413):  # the rest of the body is not wanted
        headers["connection"] = "close"
    if isinstance(answer.body, bytes):
        headers["content-length"] = str(len(answer.body))
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    start = {"type": "http.response.start", "status": answer.status, "headers": raw}
    if isinstance(answer.body, bytes):
        await send(start)
        await send({"type": "http.response.body", "body": answer.body})
        return
    try:
        await send(start)
        async for chunk in answer.body:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    finally:
        with anyio.CancelScope(shield=True):
            await answer.body.aclose()


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach this host's name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
