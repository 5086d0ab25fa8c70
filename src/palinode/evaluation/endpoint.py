"""A language model behind an OpenAI-compatible endpoint as judge.

It is shown question, answer and numbered candidates as JSON data and must reply with one JSON object,
`{"picked": [numbers]}`. Anything else is sent back with what is wrong about it, a few times. Whatever an
answer says to the judge, only numbers of candidates come out.

The key is read from an environment variable and goes into one request header and nowhere else: the default
one only to its own provider, one that was named to the address it was named for; in the clear only to this
very machine. Redirects are not followed: they would carry it to another host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from pydantic import BaseModel, ConfigDict, ValidationError

from palinode.errors import InputError, first_line
from palinode.evaluation.judging import ACCEPTED, NONE, Candidate, DecisionCache, Judge, Pick
from palinode.records import packaged_table, unique_keys

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable that holds the key of PROVIDER."""
PROVIDER = "api.openai.com"
"""The one host to which a key goes that nobody has named, and only over https."""

TOLD: Mapping[str, str] = packaged_table("evaluation/judge.toml")
"""What a judge is told."""
LONGEST_REPLY = 20_000
"""Characters of a reply that are read."""
MOST_BYTES = 4_000_000
"""Length at which what a server sends is cut off; a judge's reply has a few hundred bytes."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long an endpoint is waited for."""

    attempts: int = 6
    """Requests for one reply, when the connection or the server fails."""
    rounds: int = 3
    """Replies to one question, when they are not in the form asked for."""
    request_seconds: float = 60.0
    """Time for one request and its whole reply."""
    first_wait: float = 1.0
    """Seconds before the second attempt; twice as long before each next one."""
    longest_wait: float = 30.0
    """Limit of a wait, unless the server asks for a longer one."""
    silence_seconds: float = 300.0
    """Time without one good reply after which the endpoint is asked nothing more."""


class Reply(BaseModel):
    """The reply that a judge must give."""

    model_config = ConfigDict(extra="forbid", strict=True)

    picked: list[int]


class UnreadableReplyError(ValueError):
    """A reply is not in the form asked for; the message is for the judge."""


class _UnansweredError(Exception):
    """No reply could be had for one question; the message is the reason."""


def read_reply(text: str, candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return the positions that a reply picks, sorted.

    Words around the JSON and code fences are passed over when the text holds exactly one JSON object.
    UnreadableReplyError says what is wrong with the reply.
    """
    objects = json_objects(text[:LONGEST_REPLY])
    if len(objects) != 1:
        raise UnreadableReplyError(f"it must hold exactly one JSON object and holds {len(objects)}")
    try:
        picked = Reply.model_validate_json(objects[0]).picked
    except ValidationError as error:
        raise UnreadableReplyError(first_line(error)) from None
    return checked_pick(picked, candidates)


def checked_pick(picked: Sequence[Any], candidates: Sequence[Candidate]) -> tuple[int, ...]:
    """Return positions sorted; UnreadableReplyError when they cannot be a pick of these candidates."""
    last = len(candidates) - 1
    if not picked:
        raise UnreadableReplyError("picked is empty; pick at least one candidate, if need be none of these")
    if any(type(place) is not int or not 0 <= place <= last for place in picked):
        raise UnreadableReplyError(f"picked may hold whole numbers from 0 to {last} only")
    if len(set(picked)) < len(picked):
        raise UnreadableReplyError("picked names a candidate twice")
    if len(picked) > 1 and any(NONE in candidates[place].roles for place in picked):
        raise UnreadableReplyError("none of these cannot be picked together with another candidate")
    return tuple(sorted(picked))


def json_objects(text: str) -> list[str]:
    """Return the outermost JSON objects in a text, as written; one that names a key twice is none."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    found, place = [], text.find("{")
    while place >= 0:
        try:
            _, end = decoder.raw_decode(text, place)
        except ValueError:
            end = place + 1
        except RecursionError:
            return []
        else:
            found.append(text[place:end])
        place = text.find("{", end)
    return found


class NoReplyError(Exception):
    """Nothing usable came back: refused, timed out, or cut off."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """What a server sent back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def post(url: str, content: bytes, headers: Mapping[str, str], *, seconds: float) -> HttpReply:
    """Send content and return the reply, whatever its status; NoReplyError after `seconds` in all.

    The time is that of the whole exchange: a limit for each read would let a server that sends a byte a
    second hold a request for ever.
    """
    try:
        return asyncio.run(asyncio.wait_for(_exchange(url, content, headers), seconds))
    except TimeoutError:
        raise NoReplyError(f"no complete reply within {seconds:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise NoReplyError(_words(error)) from None


async def _exchange(url: str, content: bytes, headers: Mapping[str, str]) -> HttpReply:
    proxies = not is_loopback(urlsplit(url).hostname or "")  # what stays here goes past no proxy
    client = httpx2.AsyncClient(trust_env=proxies, timeout=None, verify=ssl.create_default_context())
    async with client, client.stream("POST", url, content=content, headers=headers) as reply:
        body = bytearray()
        async for piece in reply.aiter_bytes():
            body += piece
            if len(body) > MOST_BYTES:
                break
        return HttpReply(reply.status_code, reply.headers, bytes(body[:MOST_BYTES]))


def is_loopback(host: str) -> bool:
    """Tell whether a host, in small letters and without brackets, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _words(error: BaseException) -> str:
    """Return in words why a connection failed, from the first cause of an error that says so."""
    causes = [error]
    for cause in causes:  # grows
        parts = cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
        causes += [one for one in (cause.__cause__, cause.__context__, *parts) if one and one not in causes]
        if isinstance(cause, ConnectionRefusedError):
            return "the connection was refused"
        if isinstance(cause, socket.gaierror):
            return "the host name is unknown"
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"the certificate is not valid ({cause.verify_message})"
    return f"the connection broke ({type(error).__name__})"


class EndpointJudge(Judge):
    """A judge that asks a model at an OpenAI-compatible address, `BASE/chat/completions`."""

    def __init__(
        self,
        base: str,
        model: str,
        *,
        cache: DecisionCache,
        key_variable: str | None = None,
        at_once: int = 4,
        patience: Patience | None = None,
    ):
        """Check address, model and key; nothing is sent yet.

        `key_variable` names the environment variable with the key. Unnamed, OPENAI_API_KEY is used where the
        address is https://api.openai.com, and any other gets no key. InputError for a key that would go
        over http to another machine.
        """
        self.base = _checked_base(base)
        if not model.strip():
            raise InputError(f"the judge at {self.base} needs the name of a model")
        self.model = model
        self.name = f"{self.base} {model}"
        self.at_once = at_once
        default = KEY_VARIABLE if urlsplit(self.base).hostname == PROVIDER else None
        self._key_variable = key_variable or default
        self._key = _key_for(self.base, key_variable)
        self._cache = cache
        self._patience = patience or Patience()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}
        self._quiet_since: float | None = None  # the first of the failures since the last good reply
        self._not_before = 0.0  # what a rate limit asked for

    def __repr__(self) -> str:
        return f"EndpointJudge({self.name!r})"

    def __getstate__(self) -> Any:
        raise TypeError("a judge holds a key and is not pickled; open it again")

    def pick(self, question: str, answer: str, candidates: Sequence[Candidate]) -> Pick:
        """Return the model's pick, from the cache if it has been asked before.

        InputError when the endpoint refuses the key, or knows no such address or model.
        """
        messages = first_messages(question, answer, candidates)
        key = self._cache.key({"endpoint": self.base, "model": self.model, "messages": messages})
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:  # so that two equal questions at a time are one request
            try:
                return Pick(checked_pick(self._cache.get(key) or (), candidates), decision=key)
            except UnreadableReplyError:
                pass
            return self._asked(messages, key, candidates)

    def stop(self) -> None:
        """End all waiting; nothing more is asked."""
        self._stopped.set()

    def _asked(self, messages: list[dict[str, str]], key: str, candidates: Sequence[Candidate]) -> Pick:
        problem = ""
        for _ in range(self._patience.rounds):
            try:
                text = self._completion(messages)
                picked = read_reply(text, candidates)
            except _UnansweredError as error:
                return Pick(None, str(error))
            except UnreadableReplyError as error:
                problem = str(error)
                objection = f"That reply cannot be used: {problem}.{TOLD['reply_form']}"
                messages = [
                    *messages,
                    {"role": "assistant", "content": text[:2000] or "(empty)"},
                    {"role": "user", "content": objection},
                ]
                continue
            self._cache.put(key, picked, judge=self.name)
            return Pick(picked, decision=key)
        return Pick(None, f"no readable reply in {self._patience.rounds} tries; of the last: {problem}")

    # One reply, whatever the weather

    def _completion(self, messages: list[dict[str, str]]) -> str:
        """Return the text of one reply; _UnansweredError when it cannot be had."""
        content = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode("ascii")
        reason = ""
        for attempt in range(self._patience.attempts):
            while (left := self._not_before - time.monotonic()) > 0:
                self._pause(left, reason or "the server asked us to wait")
            self._pause(0.0, reason)
            started = time.monotonic()
            text, reason, asked = self._attempt(content)
            if text is not None:
                self._quiet_since = None
                return text
            with self._lock:  # a wait that the server asks for holds for every thread
                self._quiet_since = started if self._quiet_since is None else self._quiet_since
                self._not_before = max(self._not_before, time.monotonic() + asked)
            if attempt + 1 < self._patience.attempts:
                longest = min(self._patience.longest_wait, self._patience.first_wait * 2**attempt)
                own = longest * random.uniform(0.5, 1.0)  # so that several do not come back at one moment
                self._pause(max(own, asked), reason)
        raise _UnansweredError(f"no reply in {self._patience.attempts} attempts; at the last one {reason}")

    def _attempt(self, content: bytes) -> tuple[str | None, str, float]:
        """Return a reply's text, or None with the reason and the seconds that the server asks us to wait."""
        url, seconds = f"{self.base}/chat/completions", self._patience.request_seconds
        try:
            reply = post(url, content, self._headers(), seconds=seconds)
        except NoReplyError as error:
            return None, str(error), 0.0
        if reply.status == 200 and (text := _text_of(reply.body)) is not None:
            return text, "", 0.0
        return None, self._problem(reply), retry_after(reply.headers) or 0.0

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers["Accept-Encoding"] = "identity"
        return headers if self._key is None else {**headers, "Authorization": f"Bearer {self._key}"}

    def _problem(self, reply: HttpReply) -> str:
        """Return what is wrong with a reply when asking again may help; raise when it does not."""
        status, words = reply.status, ""
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # the server's own short words
            said = " ".join(str(json.loads(reply.body)["error"]["message"]).split())
            said = said.replace(self._key, "…") if self._key else said  # should it repeat the key
            words = f": {said[:200]}" if said else ""
        if status in (401, 403):
            self.stop()
            how = f"{'set' if self._key is None else 'check'} {self._key_variable}"
            if self._key_variable is None:
                how = "name the environment variable that holds its key with --key-variable"
            raise InputError(
                f"the judge at {self.base} does not let us in (HTTP {status}); {how}, "
                "and whether it may use this model"
            )
        if status in (404, 405) or 300 <= status < 400:
            self.stop()
            raise InputError(
                f"there is no judge model {self.model!r} at {self.base} (HTTP {status}{words}); "
                "check the model's name, and that the address is the one before /chat/completions"
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return f"the server said HTTP {status}{words}"
        if status == 200:
            return "the server's reply was not a whole chat completion"
        raise _UnansweredError(f"the server refused the question (HTTP {status}{words})")

    # Waiting

    def _pause(self, seconds: float, reason: str) -> None:
        """Wait; _UnansweredError when that would go past our patience, or somebody has stopped us."""
        if self._quiet_since is not None:
            quiet = time.monotonic() - self._quiet_since
            if quiet + seconds > self._patience.silence_seconds:
                raise _UnansweredError(
                    f"given up: no good reply for {quiet:.0f} s, and {reason or 'the server says nothing'}"
                )
        if self._stopped.wait(seconds):
            raise _UnansweredError("stopped")


def first_messages(question: str, answer: str, candidates: Sequence[Candidate]) -> list[dict[str, str]]:
    """Return the conversation that asks for a pick; the data go in as one JSON object."""
    asked = "any_accepted" if any(ACCEPTED in one.roles for one in candidates) else "closest"
    data = {
        "question": question,
        "answer": answer,
        "candidates": [{"number": n, "text": candidate.text} for n, candidate in enumerate(candidates)],
    }
    return [
        {"role": "system", "content": TOLD[asked] + TOLD["reply_form"]},
        {"role": "user", "content": json.dumps(data, ensure_ascii=False)},
    ]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; None without one."""
    value = str(headers.get("Retry-After", "")).strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _text_of(body: bytes) -> str | None:
    """Return the text of a chat completion; None when the body is something else, or cut off."""
    try:
        choice = json.loads(body)["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return "" if content is None else content if isinstance(content, str) else None


def _checked_base(base: str) -> str:
    try:
        parts = urlsplit(base)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or any(mark.isspace() for mark in base):
        raise InputError(
            "a judge's address begins with http:// or https://, such as https://api.openai.com/v1"
        )
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise InputError(
            f"the judge's address at {host} must hold no user, password or query, since it is recorded; "
            f"put the key into the environment variable {KEY_VARIABLE}"
        )
    return base.rstrip("/").removesuffix("/chat/completions")


def _key_for(base: str, variable: str | None) -> str | None:
    """Return the key that goes to an address, if any; InputError when it must not or cannot."""
    parts = urlsplit(base)
    secure = parts.scheme == "https"
    if variable is None and not (secure and parts.hostname == PROVIDER and parts.port in (None, 443)):
        return None
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if not key:
        if variable is None:
            return None
        raise InputError(f"the environment variable {variable} holds no key; set it, or name another")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"the key in {variable or KEY_VARIABLE} holds marks that no key has; was it copied whole?"
        )
    if not secure and not is_loopback(parts.hostname or ""):
        raise InputError(
            f"the key in {variable} would go to {parts.hostname} over http, for everybody to read; name an "
            "https:// address"
        )
    return key
