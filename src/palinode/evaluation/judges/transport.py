"""One POST of JSON with a deadline for the whole exchange, on the standard library alone.

A time limit per read lets a server that sends a byte a second hold a request for ever. Here a timer shuts
the connection down when the time is over, whatever it is doing. Redirects are not followed: they would
carry the key to another host.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

MOST_BYTES = 4_000_000
"""Length at which a reply is cut off; a judge's reply has a few hundred bytes."""


class NoReplyError(Exception):
    """Nothing usable came back: refused, timed out, or cut off."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """What a server sent back."""

    status: int
    headers: Message
    body: bytes


def post(url: str, content: bytes, headers: Mapping[str, str], *, seconds: float) -> HttpReply:
    """Send content and return the reply, whatever its status; NoReplyError after `seconds` in all."""
    request = urllib.request.Request(url, data=content, headers=dict(headers), method="POST")
    watch = _Watch()
    handlers: list[urllib.request.BaseHandler] = [_Http(watch), _Https(watch), _NoRedirect()]
    if is_loopback(urlsplit(url).hostname or ""):  # what stays here goes past no proxy
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    timer = threading.Timer(seconds, watch.end)
    timer.daemon = True
    timer.start()
    try:
        with _opened(opener, request, seconds) as response:
            return HttpReply(response.status, response.headers, response.read(MOST_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        if watch.ended or isinstance(getattr(error, "reason", error), TimeoutError):
            raise NoReplyError(f"no complete reply within {seconds:g} s") from None
        raise NoReplyError(_words(error)) from None
    finally:
        timer.cancel()


def is_loopback(host: str) -> bool:
    """Tell whether a host, in small letters and without brackets, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _opened(opener: urllib.request.OpenerDirector, request: urllib.request.Request, seconds: float) -> Any:
    try:
        return opener.open(request, timeout=seconds)
    except urllib.error.HTTPError as error:  # a reply too
        return error


def _words(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(reason, socket.gaierror):
        return "the host name is unknown"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate is not valid ({reason.verify_message})"
    return f"the connection broke ({type(reason).__name__})"


@dataclass(slots=True)
class _Watch:
    """The sockets of one request, to be shut down when its time is over."""

    sockets: list[socket.socket] = field(default_factory=list)
    ended: bool = False

    def end(self) -> None:
        self.ended = True
        for each in self.sockets:
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # not TLS's own, which another thread is in


class _Http(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watched(http.client.HTTPConnection, self.watch), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        connection = _watched(http.client.HTTPSConnection, self.watch)
        return self.do_open(connection, request, context=ssl.create_default_context())


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: Any) -> None:
        return None


def _watched(kind: type[Any], watch: _Watch) -> Any:
    class Watched(kind):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            watch.sockets.append(self.sock)

    return Watched
