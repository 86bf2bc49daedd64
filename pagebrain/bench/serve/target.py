"""The server under test, seen from outside: where it is, what it calls its model, what it says of itself.

Plain blocking requests before and after a run; the load itself is sent by :mod:`~pagebrain.bench.serve.client`.
"""

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from pagebrain.bench.serve.records import error_message
from pagebrain.errors import ConfigError, PageBrainError

_TIMEOUT_S = 30.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy in between would be measured too


@dataclass(frozen=True)
class Target:
    """An OpenAI-compatible server. ``url`` is its root, without ``/v1``; ``api_key`` is sent as a bearer token."""

    url: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None) -> "Target":
        """Check ``url`` and cut what does not belong to its root. Raises ``ConfigError``."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"--url must look like http://127.0.0.1:8000, got {url!r}")
        return cls(url.rstrip("/").removesuffix("/v1"), api_key)

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, by its name."""
        return urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def find_model(self, name: str | None) -> dict[str, Any]:
        """The entry of ``GET /v1/models`` for ``name``, or the first. Raises ``PageBrainError`` if there is none."""
        payload = self._get("/v1/models")
        models = payload.get("data") if isinstance(payload, dict) else None
        if not isinstance(models, list) or not all(isinstance(entry, dict) and "id" in entry for entry in models):
            raise PageBrainError(f"{self.url}/v1/models gave no list of models: is this an OpenAI-compatible server?")
        if name is None and models:
            return dict(models[0])
        for entry in models:
            if entry["id"] == name:
                return dict(entry)
        served = ", ".join(str(entry["id"]) for entry in models) or "no model"
        raise PageBrainError(f"{self.url} serves {served}" + ("" if name is None else f", not {name}"))

    def version(self) -> Any:
        """What ``GET /version`` says, or ``None`` where there is none."""
        try:
            return self._get("/version")
        except PageBrainError:
            return None

    def _get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        try:
            with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                reason = "check --api-key or PAGEBRAIN_API_KEY"
            else:
                reason = _said(error)
            raise PageBrainError(f"{self.url}{path} answered {error.code}: {reason}") from None
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", error))
            advice = "start one with pagebrain serve, or say where it is with --url"
            raise PageBrainError(f"no server answers at {self.url}: {reason}; {advice}") from None
        except ValueError:
            raise PageBrainError(f"{self.url}{path} gave no JSON: is this an OpenAI-compatible server?") from None


def _said(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, or the status line's."""
    try:
        return error_message(json.loads(error.read()))
    except (ValueError, OSError, HTTPException):
        return str(error.reason)
