"""API keys: stored as digests, compared in constant time."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from redwood.errors import ArgumentError

ENVIRONMENT = "REDWOOD_API_KEY"
_SHORTEST = 8


class Keys:
    """The server's API keys; without any, every client is served.

    Args:
        keys: what clients send after "Bearer "; only their digests are kept.

    Raises:
        ArgumentError: a key that is too short, or has characters that no header can carry.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        digests = []
        for number, key in enumerate(dict.fromkeys(keys), start=1):
            if len(key) < _SHORTEST or not key.isascii() or not key.isprintable() or " " in key:
                raise ArgumentError(
                    f"API key {number} must be {_SHORTEST} or more ASCII signs without spaces"
                )
            digests.append(_digest(key.encode()))
        self._digests: Sequence[bytes] = digests

    def __len__(self) -> int:
        return len(self._digests)

    def owner(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """Returns the owner of a request: "key-1", ...; "open" without keys; None: no valid key.

        Args:
            headers: of the request, names in lower case.

        Guarantee: constant time: every key is compared, also after a match.
        """
        if not self._digests:
            return "open"
        given = [value for name, value in headers if name == b"authorization"]
        if not given:  # Anthropic's clients
            given = [b"bearer " + value for name, value in headers if name == b"x-api-key"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest, found = _digest(key.strip()), 0
        for number, ours in enumerate(self._digests, start=1):
            found += number * hmac.compare_digest(digest, ours)
        return f"key-{found}" if found and scheme.lower() == b"bearer" else None

    def namespace(self, owner: str) -> str:
        """Returns a name for an owner's data, which does not depend on the order of the keys."""
        number = owner.removeprefix("key-")
        return self._digests[int(number) - 1].hex() if number != owner else owner


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()


def read_keys(
    given: Sequence[str], file: Path | None, environment: Mapping[str, str] | None = None
) -> Keys:
    """Returns the keys from options, a file and the environment together.

    Args:
        given: keys.
        file: one key a line; empty lines and lines that begin with # are skipped.
        environment: REDWOOD_API_KEY may hold keys, separated by commas; None: the process's own.

    Raises:
        ArgumentError: a file that cannot be read or holds no key, or a key that cannot be one.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ArgumentError(f"cannot read API keys from {file}: {reason}") from error
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise ArgumentError(f"{file} holds no API key: write one a line")
        keys += found
    environment = os.environ if environment is None else environment
    keys += [key for part in environment.get(ENVIRONMENT, "").split(",") if (key := part.strip())]
    return Keys(keys)
