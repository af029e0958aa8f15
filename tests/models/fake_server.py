"""An OpenAI-compatible server that lies, fails and disconnects as a test tells it to."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any


class Reply:
    """What goes back: a status, headers and a body; `cut` closes the connection in the middle of the body."""

    def __init__(self, body: Any, status: int = 200, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.body, self.status, self.headers, self.cut = body, status, headers or {}, cut


def words_of(text: str) -> list[str]:
    """Return a text's tokens: words with the blank before them, and single other characters."""
    return re.findall(r" ?\w+|\W", text)


def logprob_of(token: str) -> float:
    return -0.25 * len(token)


def completion(text: str, path: str, body: dict[str, Any], index: int = 0, **changes: Any) -> dict[str, Any]:
    """Return one choice in the endpoint's form, with log-probabilities where they are asked for."""
    choice: dict[str, Any] = {"index": index, "finish_reason": "stop"}
    tokens = words_of(text)
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": text}
        listed = [{"token": token, "logprob": logprob_of(token), "top_logprobs": []} for token in tokens]
        choice["logprobs"] = {"content": listed} if body.get("logprobs") else None
    else:
        choice["text"] = text
        choice["logprobs"] = None
        if body.get("logprobs"):
            values = [None if place == 0 and body.get("echo") else logprob_of(one) for place, one in enumerate(tokens)]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values}
    return choice | changes


def well_behaved(path: str, body: dict[str, Any], seen: int) -> Reply:
    """Answer honestly: texts follow from the prompt and the seed."""
    prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    if body.get("echo"):
        choices = [completion(f"{prompt} and", path, body)]
    else:
        choices = [
            completion(f"about {prompt.split()[-1]} by {body.get('seed', 0) + index}", path, body, index)
            for index in range(body.get("n", 1))
        ]
    counted = sum(len(words_of(c["text"] if "text" in c else c["message"]["content"])) for c in choices)
    usage = {"prompt_tokens": len(words_of(prompt)), "completion_tokens": counted}
    return Reply({"choices": choices, "usage": usage})


@contextmanager
def serving(answer: Callable[[str, dict[str, Any], int], Reply], port: int = 0) -> Iterator[SimpleNamespace]:
    """Run a server on a port, or a free one; `.url` is its address, `.requests` what it was asked, in order."""
    state = SimpleNamespace(requests=[], headers=[], at_once=0, most_at_once=0)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send(Reply({"data": [{"id": "tiny"}, {"id": "other"}]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                seen = len(state.requests)
                state.requests.append((self.path, body))
                state.headers.append(dict(self.headers))
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
            try:
                reply = answer(self.path, body, seen)
            finally:
                with lock:
                    state.at_once -= 1
            self.send(reply)

        def send(self, reply: Reply) -> None:
            data = reply.body.encode() if isinstance(reply.body, str) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if reply.cut else data)
            if reply.cut:
                self.wfile.flush()
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.port = server.server_address[1]
    state.url = f"http://127.0.0.1:{state.port}"

    def go_away() -> None:
        server.shutdown()
        server.server_close()

    state.go_away = go_away
    try:
        yield state
    finally:
        go_away()
        thread.join()
