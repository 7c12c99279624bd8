"""A client for OpenAI's HTTP protocol, as in vLLM, SGLang, llama.cpp and commercial services: text in, text out.

The key comes from the environment, and goes into one header of each request. It never appears in messages.
"""

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx2
from transformers.utils import logging

from .servers import ServerKey


__all__ = ["ENDS", "KEY_VARIABLE", "OpenAIServer"]

logger = logging.get_logger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
ENDS = ("stop", "length")
"""How usable answers end: by themselves, or cut."""
_TIMEOUT = httpx2.Timeout(600.0, connect=10.0)  # seconds; an answer may be long, and wait for others
_PATIENCE = 900.0  # seconds after which a request is not tried again, whatever the server says
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds between the tries of a request
_RETRIED = (408, 429, 500, 502, 503, 504)
_SHOWN = 300  # characters of what a server says, or of names


class OpenAIServer:
    """
    A server, and the model on it that generates answers.

    Args:
        url (`str`):
            Base URL of the API, such as `http://localhost:8000/v1`. `/v1` is added to a URL without a path.
        model (`str`, *optional*):
            The model's name on the server. `None` if the server has only one.
        num_connections (`int`, *optional*, defaults to `1`):
            How many threads may send requests at once.

    Raises:
        ConnectionError: if `model` is `None` and the server does not answer.
        ValueError: if `model` is `None` and the server does not have exactly one, or if no header can hold the key.
    """

    def __init__(self, url: str, model: str | None = None, num_connections: int = 1):
        self.url = url.rstrip("/") + ("" if urlsplit(url).path.strip("/") else "/v1")
        self._key = ServerKey(KEY_VARIABLE)
        limits = httpx2.Limits(max_connections=num_connections, max_keepalive_connections=num_connections)
        self._client = httpx2.Client(headers=self._key.headers, timeout=_TIMEOUT, limits=limits)
        self.model = self._only_model() if model is None else model

    def complete(self, request: dict[str, Any]) -> tuple[str, str]:
        """The server's answer to one request.

        Args:
            request: The body without the model's name. `messages` go to `/chat/completions`, a `prompt` (a text) to
                `/completions`.

        Returns:
            The answer's text, without thoughts that the server separates from it. Then `"stop"` if it ended by itself,
            or `"length"` if it was cut.

        Raises:
            ConnectionError: if the server cannot be reached, or does not answer in time.
            ValueError: if it rejects the request, or answers with anything else.
        """
        asked = request["prompt"] if "prompt" in request else request["messages"][-1].get("content")
        try:
            return self._completed(request)
        except ValueError as error:
            raise ValueError(f"{error} It was asked for the answer to {str(asked)[-100:]!r}.") from None

    def _completed(self, request: dict[str, Any]) -> tuple[str, str]:
        is_chat = "messages" in request
        path = "/chat/completions" if is_chat else "/completions"
        said = self._ask("POST", path, {"model": self.model, **request})
        try:
            (choice,) = said["choices"]
            text = choice["message"]["content"] if is_chat else choice["text"]
            reason = choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise self._unexpected(path, said, "one answer in `choices`, with its text and `finish_reason`") from None
        if reason not in ENDS:
            raise ValueError(
                f"{self.url}{path} ended an answer with `finish_reason` {self._shown(reason)}; only 'stop' (it ended) "
                "and 'length' (it was cut) can be trained on. Filter out the row."
            )
        if not isinstance(text, str | None):
            raise self._unexpected(path, said, "an answer that is a text")
        # JSON can hold half of a character, which no file can
        return (text or "").encode(errors="replace").decode(), reason

    def _only_model(self) -> str:
        said = self._ask("GET", "/models")
        try:
            names = [str(model["id"]) for model in said["data"]]
        except (KeyError, TypeError):
            raise self._unexpected("/models", said, "a list of models") from None
        if len(names) != 1:
            listed = self._shown(", ".join(map(repr, names))) if names else "none"
            raise ValueError(
                f"`teacher_answers_model` is None, but {self.url} does not have exactly one model: it lists {listed}. "
                "Set `teacher_answers_model` to one of its models."
            )
        return names[0]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's reply, as Python objects. A request with a temporary failure is sent again."""
        start = time.monotonic()
        failure: Exception
        for pause in (*_PAUSES, None):
            try:
                response = self._client.request(method, f"{self.url}{path}", json=body)
            except httpx2.RequestError as error:
                failure = ConnectionError(
                    f"{self.url} did not answer ({type(error).__name__}: {self._shown(str(error))}). Check "
                    "`teacher_answers_url`, and that the server is up."
                )
            else:
                if 200 <= response.status_code < 300:
                    try:
                        return response.json()
                    except ValueError:
                        raise self._unexpected(path, response.text, "JSON") from None
                failure = ValueError(
                    f"{self.url}{path} answered with HTTP {response.status_code}: {self._shown(response.text)}. "
                    f"{_remedy(response)}"
                )
                if response.status_code not in _RETRIED:
                    break
                pause = pause and max(pause, _asked_pause(response))
            if pause is None or time.monotonic() + pause - start > _PATIENCE:
                break
            logger.warning_once(f"{self.url} is busy, or does not answer. Requests that failed are sent again.")
            time.sleep(pause)
        raise failure

    def _unexpected(self, path: str, said: Any, wanted: str) -> ValueError:
        return ValueError(
            f"{self.url}{path} did not answer with {wanted}, but with {self._shown(said)}. `teacher_answers_url` must "
            "be the address of an OpenAI-compatible API, which usually ends with /v1."
        )

    def _shown(self, said: Any) -> str:
        """A server's reply, cut, and without the key if it repeats that."""
        return self._key.hidden(said if isinstance(said, str) else repr(said), _SHOWN)


def _asked_pause(response: httpx2.Response) -> float:
    """Seconds to wait by the server's `Retry-After`, which is a number or a date. 0 without one."""
    value = response.headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", value):
        return float(value)
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


def _remedy(response: httpx2.Response) -> str:
    status = response.status_code
    if status in (401, 403):
        return f"Set the environment variable {KEY_VARIABLE} to a key that it takes."
    if status == 404:
        return "Check `teacher_answers_url` (it usually ends with /v1) and `teacher_answers_model`."
    if status in _RETRIED:
        return "It was asked several times. Start again when it is up, or with fewer requests at a time."
    if 300 <= status < 400:
        return f"Set `teacher_answers_url` to where it points: {response.headers.get('Location')}."
    return "Change the settings or the row that it does not take."
