"""Requests to an OpenAI-compatible server: retried, bounded, journaled. `remote.py` says what is asked.

A request that fails in passing (no connection any more, a timeout, 408, 429, 5xx, an answer cut short or garbled) is
sent again after an exponentially growing pause with jitter from a named random stream, or after the time that the
server's Retry-After asks for. What cannot pass (a wrong key, an unknown model, a refused field) ends the work at once
with one line. Every answer that was understood is a line of the journal before it is used: work that stops midway, for
whatever reason, sends only what is missing when it is started again.
"""

import asyncio
import email.utils
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TextIO, TypeVar

import httpx2
from pydantic import Field

from qinglan.core.config import Config
from qinglan.core.errors import InputError
from qinglan.core.files import hash_of
from qinglan.core.rng import numpy_stream

MAX_PAUSE_S = 60.0
"""Longest pause of our own choice between two tries."""
MAX_RETRY_AFTER_S = 600.0
"""A server that asks for a longer pause is taken to be closed for today."""
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}

T = TypeVar("T")


class RemoteConfig(Config):
    """How a server is asked."""

    endpoint: Literal["chat", "completions"] = "chat"
    """chat: the server writes conversations with its own template; completions: the prompt is sent as text."""
    tokenizer: Path | None = None
    """Model directory whose chat template writes the text for `completions`; default: plain "User: ... Assistant:"."""
    api_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key, if it wants one."""
    max_concurrency: int = Field(default=8, ge=1)
    """Requests under way at one time."""
    timeout: float = Field(default=300, gt=0)
    """Seconds without a sign from the server after which a request counts as failed."""
    max_retries: int = Field(default=6, ge=0)
    """Times that one request is sent again."""
    retry_delay: float = Field(default=0.5, ge=0)
    """Seconds before the first retry; doubled each time, up to 60, less a random part of up to one half."""
    journal: Path | None = None
    """File (.jsonl) of the answers so far, from which stopped work goes on; default: beside that of `sample --to`."""
    extra_body: str | None = None
    """JSON object of fields that are added to every request; null removes one, such as a seed that is not taken."""


class Refused(InputError):
    """The server answered that the request itself is wrong; the one way to go on is another request."""


class Passing(Exception):
    """A failure that may be over at the next try."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class Ask(NamedTuple):
    """One request."""

    path: str
    """Below the base address: "/chat/completions"."""
    body: dict[str, Any]
    sample: int
    """Number of its (first) sample: equal bodies ask for different draws."""

    @property
    def key(self) -> str:
        """Return the request's name in the journal; it does not depend on where the server stands."""
        return hash_of([self.path, self.body, self.sample])


class Journal:
    """Answers by request key, in memory and in a file of JSON lines that one process at a time may write."""

    def __init__(self, path: Path | None) -> None:
        """Read what an earlier process wrote. Raises `InputError` for another kind of file, or one in use."""
        self.path = path
        self.answers: dict[str, Any] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another journal") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(self._file)
        except OSError as error:
            self.close()
            raise InputError(f"{path}: another process is writing it; wait for it or choose another") from error
        except InputError:
            self.close()
            raise

    def _read(self, file: TextIO) -> None:
        file.seek(0)
        text = file.read()
        lines = text.split("\n")
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                row = json.loads(line)
                self.answers[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError) as error:
                if number == len(lines):  # cut short by a crash: that request is sent again
                    file.truncate(len("\n".join([*lines[:-1], ""]).encode()))
                    return
                raise InputError(
                    f"{self.path}:{number}: is no line of a journal of requests; choose another --remote.journal"
                ) from error
        if text and not text.endswith("\n"):
            file.write("\n")

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer; it outlives the process from here on."""
        self.answers[key] = answer
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Let another process write the file."""
        if self._file is not None:
            self._file.close()


class Server:
    """A server that is being asked, inside an `async with`."""

    def __init__(self, url: str, model: str, config: RemoteConfig, seed: int) -> None:
        """Prepare to ask for `model` at `url`; `seed` names the jitter. Raises `InputError` for no address."""
        self.base = base_address(url)
        self.model, self.config, self.seed = model, config, seed
        self.extra = read_extra_body(config.extra_body)
        self.journal = Journal(config.journal)
        self.is_stopped = False
        """No further request is sent; those under way may end."""
        self.takes_n: bool | None = None
        """Whether one request brings several completions; None before it was tried."""
        self._said: set[str] = set()
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._is_known = False
        key = os.environ.get(config.api_key_variable)
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(config.timeout, connect=min(config.timeout, 30.0)),
            limits=httpx2.Limits(max_connections=config.max_concurrency),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()
        self.journal.close()

    def say(self, text: str) -> None:
        """Print a line on standard error, once."""
        if text not in self._said:
            self._said.add(text)
            print(f"{self.base}: {text}", file=sys.stderr)

    async def ask(self, ask: Ask, read: Callable[[Any], T]) -> T:
        """Send a request unless the journal has its answer; return what `read` makes of the answer.

        `read` raises `Passing` for an answer that another try may mend. Raises `InputError` where the server cannot
        be reached, refuses (`Refused`), or has failed for the last time.
        """
        if ask.key in self.journal.answers:
            return read(self.journal.answers[ask.key])
        try:
            return await self._try(ask, read)
        except InputError as error:
            may_go_on = isinstance(error, Refused) and self.takes_n is None and "n" in ask.body
            self.is_stopped = self.is_stopped or not may_go_on
            raise

    async def _try(self, ask: Ask, read: Callable[[Any], T]) -> T:
        """Send a request until it is answered, or for the last time."""
        jitter = numpy_stream(self.seed, "retry", ask.key)
        async with self._slots:
            for attempt in range(self.config.max_retries + 1):
                if self.is_stopped:
                    raise asyncio.CancelledError
                try:
                    answer = await self._post(ask)
                    found = read(answer)
                except Passing as failure:
                    if attempt == self.config.max_retries:
                        raise InputError(self.given_up(failure, attempt + 1)) from failure
                    pause = min(MAX_PAUSE_S, self.config.retry_delay * 2**attempt) * (1 - jitter.random() / 2)
                    await asyncio.sleep(pause if failure.retry_after is None else failure.retry_after)
                else:
                    self.journal.add(ask.key, answer)
                    return found
        raise AssertionError("the last try returns or raises")

    def given_up(self, failure: Passing, num_tries: int) -> str:
        """Return the line for a request that failed at every try."""
        kept = f"finished requests are kept in {self.journal.path}, " if self.journal.path else ""
        times = f"{num_tries} times" if num_tries > 1 else "once"
        return f"{self.base}: failed {times}, lastly: {failure}; {kept}run the same command again to go on"

    async def _post(self, ask: Ask) -> Any:
        try:
            response = await self._client.post(self.base + ask.path, json=ask.body)
        except httpx2.TimeoutException as error:
            if not self._is_known and isinstance(error, httpx2.ConnectTimeout):
                raise InputError(self._no_server(error)) from error
            raise Passing(f"no answer within {self.config.timeout:g} seconds (--remote.timeout)") from error
        except httpx2.ConnectError as error:
            if not self._is_known:
                raise InputError(self._no_server(error)) from error
            raise Passing(f"the server is gone ({error})") from error
        except httpx2.TransportError as error:
            raise Passing(f"the server disconnected midway ({error or type(error).__name__})") from error
        self._is_known = True
        if response.status_code != 200:
            await self._raise_for(response, ask)
        try:
            return response.json()
        except ValueError as error:
            start = " ".join(response.text[:60].split())
            raise Passing(f"its answer is not JSON ({start!r})") from error

    def _no_server(self, error: Exception) -> str:
        return (
            f"{self.base}: no server answers there ({error or type(error).__name__}); start it, or correct --server, "
            "such as http://localhost:8000/v1"
        )

    async def _raise_for(self, response: httpx2.Response, ask: Ask) -> None:
        """Raise what a status other than 200 means."""
        status, said = response.status_code, message_of(response)
        if status in (401, 403):
            has_key = self.config.api_key_variable in os.environ
            state = "the key in" if has_key else "there is no key in"
            raise InputError(
                f"{self.base}: refuses access ({status}: {said}); {state} the environment variable "
                f"{self.config.api_key_variable}{' is not taken' if has_key else ''}; put a valid one there"
            )
        if status in PASSING:
            pause = retry_after(response.headers.get("retry-after"))
            if pause is not None and pause > MAX_RETRY_AFTER_S:
                raise InputError(f"{self.base}: is not to be asked again for {pause:.0f} seconds ({status}: {said})")
            raise Passing(f"{status}: {said}", pause)
        offered = await self._models() if status in (400, 404, 422) else []
        names_model = self.model in said or (status == 404 and offered)
        if status in (400, 404, 422) and names_model and self.model not in offered:
            some = f"; it offers {', '.join(offered[:5])}" if offered else ""
            raise InputError(f"{self.base}: knows no model '{self.model}' ({status}: {said}){some}; correct --model")
        if status == 404:
            raise InputError(
                f"{self.base}: has no {ask.path}, or no model '{self.model}' ({status}: {said}); "
                "correct --server, --model or --remote.endpoint"
            )
        raise Refused(f"{self.base}: refuses the request ({status}: {said}); see --remote.extra-body for other fields")

    async def _models(self) -> list[str]:
        """Return the names of the server's models, none where it does not say."""
        try:
            response = await self._client.get(f"{self.base}/models")
            return [str(one["id"]) for one in response.json()["data"]]
        except (httpx2.TransportError, ValueError, LookupError, TypeError):
            return []


def base_address(url: str) -> str:
    """Return the address below which the endpoints lie; "/v1" is added where there is no version at its end."""
    base = url.rstrip("/")
    try:
        parts = httpx2.URL(base)
    except httpx2.InvalidURL as error:
        raise InputError(f"--server {url}: is no address ({error}); expected http://HOST:PORT/v1") from error
    if parts.scheme not in ("http", "https") or not parts.host:
        raise InputError(f"--server {url}: is no address; expected http://HOST:PORT/v1")
    last = base.rsplit("/", 1)[-1]
    return base if last[:1] == "v" and last[1:].isdigit() else f"{base}/v1"


def read_extra_body(text: str | None) -> dict[str, Any]:
    """Return the additional fields of every request. Raises `InputError` for anything but a JSON object."""
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"--remote.extra-body: is not JSON ({error}); expected an object, such as {{}}") from error
    if not isinstance(extra, dict):
        raise InputError(f"--remote.extra-body: got {text}; expected a JSON object, such as {{}}")
    return extra


def message_of(response: httpx2.Response) -> str:
    """Return what an error answer says, in whatever form, as one short line."""
    try:
        said: Any = response.json()
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
    except ValueError:
        said = response.text
    return " ".join(str(said or response.reason_phrase).split())[:200]


def retry_after(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header, a number or a date, asks for; None where it says nothing."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
