"""An OpenAI-compatible server on loopback that answers as a test says, and keeps what it was asked."""

import contextlib
import json
import threading
from collections import deque

from loopback import LoopbackServer, QuietHandler


class ChatServer(LoopbackServer):
    """
    The server and what it was asked; a context, in which it runs.

    Args:
        answer: From a request's body to its text, or to text and `finish_reason`. By default the last message's
            content, or the prompt, in reverse order of words.
        models: Names that `/v1/models` lists. Requests for others are refused.
        key: What it wants as a key.
    """

    def __init__(self, answer=None, models=("teacher",), key=None):
        self.answer, self.models, self.key = answer or reversed_words, list(models), key
        self.requests: list[tuple[str, dict]] = []  # path and body of each that got an answer
        self.faults: deque = deque()  # (status, headers, body) to say before anything else; None: hangs up
        self.lock = threading.Lock()
        super().__init__(_Handler, "chat")
        self.url = f"{self.host}/v1"

    @property
    def bodies(self):
        return [body for _, body in self.requests]


def asked(body):
    """The text that a request ends with."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def reversed_words(body):
    return " " * ("prompt" in body) + " ".join(reversed(asked(body).split()))


class _Handler(QuietHandler):
    chat: ChatServer

    def do_GET(self):
        if self._refused():
            return
        data = [{"id": name, "object": "model"} for name in self.chat.models]
        self._say(200, {"object": "list", "data": data} if self.path == "/v1/models" else {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        if body["model"] not in self.chat.models:
            self._say(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
            return
        said = self.chat.answer(body)
        text, reason = said if isinstance(said, tuple) else (said, "stop")
        with self.chat.lock:
            self.chat.requests.append((self.path, body))
        if "messages" in body:
            choice = {"message": {"role": "assistant", "content": text, "reasoning_content": "red red red"}}
        else:
            choice = {"text": text}
        self._say(200, {"choices": [{"index": 0, "finish_reason": reason, **choice}], "model": body["model"]})

    def _refused(self):
        with self.chat.lock:
            fault = self.chat.faults.popleft() if self.chat.faults else ()
        if fault is None:
            self.close_connection = True
            self.connection.close()
        elif fault:
            self._say(*fault)
        elif self.chat.key is not None and self.headers["Authorization"] != f"Bearer {self.chat.key}":
            self._say(401, {"error": {"message": f"Incorrect API key provided: {self.headers['Authorization']}"}})
        else:
            return False
        return True

    def _say(self, status, body, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(BrokenPipeError):  # who asked may have had enough of waiting
            self._send(status, data, headers)

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)
