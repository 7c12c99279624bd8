"""Shared by the clients of both kinds of servers: an address, and a key that appears in no message."""

import os
import re
from urllib.parse import urlsplit


__all__ = ["ServerKey", "check_url"]


class ServerKey:
    """
    The key of a server, if its environment variable is set. It goes into one header, and is only kept in memory.

    Raises:
        ValueError: if no header can hold the key. The message does not show it.
    """

    def __init__(self, variable: str):
        self._key = os.environ.get(variable, "").strip()
        if re.search(r"[^!-~]", self._key):
            raise ValueError(
                f"The environment variable {variable} holds white space or characters beyond ASCII, which no key has. "
                "Set it anew."
            )

    def __bool__(self) -> bool:
        return bool(self._key)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def hidden(self, said: str, most: int) -> str:
        """A server's reply without the key if it repeats that, then cut to `most` characters."""
        said = said.replace(self._key, "***") if self._key else said
        return said if len(said) <= most else f"{said[:most]}..."


def check_url(name: str, url: str, variable: str, example: str) -> None:
    """Reject a text that is not a server's address, or one that holds a secret. Settings are saved and shown.

    Args:
        name: Name of the field, for messages.
        variable: The environment variable that a key goes into.
        example: An address, for messages.

    Raises:
        TypeError, ValueError: with the expected form. A secret is not repeated.
    """
    if not isinstance(url, str):
        raise TypeError(f"`{name}` is a {type(url).__name__}; it must be a text such as {example!r}.")
    if set("@?#") & set(url):
        raise ValueError(
            f"`{name}` holds a user, a query or a fragment, but settings are saved and shown. It must be a bare "
            f"address, such as {example!r}. A key goes into the environment variable {variable}."
        )
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port or an IPv6 address
        is_address = False
    if not is_address:
        raise ValueError(
            f"`{name}` is {url!r}; it must be an address that starts with http:// or https://, such as {example!r}."
        )
