"""A server of the OpenAI chat protocol for tests: answers from a function, and every fault on request."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["ChatServer", "Fault", "text_of"]


@dataclass
class Fault:
    """What happens to one request in place of an answer."""

    status: int = 200
    delay_s: float = 0.0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    hang_up: bool = False


def text_of(body: Mapping[str, Any]) -> str:
    """All text of a request's messages."""
    contents = [message["content"] for message in body["messages"]]
    parts = [c if isinstance(c, str) else "".join(p.get("text", "") for p in c) for c in contents]
    return "\n".join(parts)


class ChatServer:
    """``with ChatServer(answer) as server``: serves at ``server.url`` until the end of the block.

    ``answer(body)`` gives a text, or a dictionary that replaces fields of the protocol's answer (``text``,
    ``finish_reason``, ``refusal``, ``usage``). ``faults(body, number)`` gives a :class:`Fault` or None for the request of
    that number. ``requests`` are all bodies in order of arrival, ``billed`` counts answers by ``Idempotency-Key``,
    ``most`` is the largest number of requests that were there at the same time.
    """

    def __init__(
        self,
        answer: Callable[[Mapping[str, Any]], str | Mapping[str, Any]],
        faults: Callable[[Mapping[str, Any], int], Fault | None] | None = None,
        *,
        key: str | None = None,
    ) -> None:
        self.answer, self.faults, self.key = answer, faults, key
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.billed: dict[str, int] = {}
        self.tokens = 0
        self.most = self._now = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                server._serve(self)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.requests)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.times.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            fault = (self.faults and self.faults(body, number)) or Fault()
            time.sleep(fault.delay_s)
            if fault.hang_up:
                handler.close_connection = True
                handler.connection.close()
                return
            status, data = fault.status, fault.body
            if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
                status = 401
            if status == 200 and data is None:
                data = json.dumps(self._reply(body)).encode()
                with self._lock:
                    key = handler.headers["Idempotency-Key"]
                    self.billed[key] = self.billed.get(key, 0) + 1
        finally:
            with self._lock:
                self._now -= 1
        data = json.dumps({"error": {"message": f"status {status}"}}).encode() if data is None else data
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **fault.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _reply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        given = self.answer(body)
        fields = {"text": given} if isinstance(given, str) else dict(given)
        text = fields.get("text", "")
        usage = {"prompt_tokens": len(text_of(body).split()), "completion_tokens": len(text.split())}
        usage = fields.get("usage", {**usage, "total_tokens": sum(usage.values())})
        if usage:
            with self._lock:
                self.tokens += usage["prompt_tokens"] + usage["completion_tokens"]
        message = {"role": "assistant", "content": text, "refusal": fields.get("refusal")}
        choice = {"index": 0, "message": message, "finish_reason": fields.get("finish_reason", "stop")}
        reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return {**reply, "usage": usage} if usage else reply
