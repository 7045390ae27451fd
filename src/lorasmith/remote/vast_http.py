"""Vast.ai's REST API as a connection: the key, requests that may be repeated, and what a refusal means."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from lorasmith.errors import ExitCode, InputError, MachineError, ProviderError, os_errors
from lorasmith.remote.provider import Clock, RefusedError, UncertainError

NAME = "vast.ai"
CONSOLE = "https://console.vast.ai/instances/"
_ATTEMPTS = 6


def read_key() -> str:
    """The account's key, from `VAST_API_KEY` or a file that only its owner can read.

    Raises `InputError` where there is none, or where others could read the file.
    """
    if key := os.environ.get("VAST_API_KEY", "").strip():
        return key
    shared = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    path = Path(shared) / "vastai" / "vast_api_key"
    if not path.is_file():
        raise InputError(
            "there is no key for Vast.ai",
            where=path,
            expected="the variable VAST_API_KEY, or this file",
            remedy="make a key at https://cloud.vast.ai/manage-keys/ and export VAST_API_KEY",
        )
    with os_errors(path, "read the key"):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(
                "others than its owner can read the file of the key", where=path, remedy=f"chmod 600 {path}"
            )
        return path.read_text().strip()


class KeyRefusedError(RefusedError):
    """The key is wrong or not enough: a person's mistake, not the network's."""

    exit_code = ExitCode.BAD_INPUT


class Connection:
    """One account, over one address."""

    def __init__(self, key: str, url: str, clock: Clock, timeout: float) -> None:
        """`timeout`: seconds for one answer. Needs the extra `remote`."""
        try:
            import httpx2 as httpx
        except ImportError as error:
            raise MachineError(
                "httpx2 is not installed here", remedy="pip install 'lorasmith[remote]'"
            ) from error
        self.clock = clock
        self._http = httpx
        self._timeout = timeout
        self._client = httpx.Client(
            base_url=url,
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
        )

    def once(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        """A request that must not be repeated, and its answer, which has success in it.

        Raises `RefusedError` when nothing was done, `UncertainError` when nobody knows.
        """
        try:
            answer = self._client.request(method, path, **request)
        except self._http.HTTPError as error:
            raise UncertainError(f"no answer to the request to rent: {error!r}", where=NAME) from error
        # 4xx says that nothing was done; 408 and 429 may come from a gateway that had passed it on.
        if 400 <= answer.status_code < 500 and answer.status_code not in (408, 409, 429):
            raise self._refusal(answer)
        body = _json(answer)
        if answer.status_code != 200 or not isinstance(body, dict) or not body.get("success"):
            raise UncertainError(
                f"the answer to the request to rent is none: status {answer.status_code}", where=NAME
            )
        return body

    def again(
        self, method: str, path: str, *, missing: dict[str, Any] | None = None, **request: Any
    ) -> dict[str, Any]:
        """A request that may be repeated. `missing`: what a 404 stands for, where it is an answer."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                self.clock.sleep(min(2.0**attempt, 30.0))
            try:
                answer = self._client.request(method, path, **request)
            except self._http.HTTPError as error:
                problem = repr(error)
                continue
            if answer.status_code == 404 and missing is not None:
                return missing
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                problem = f"status {answer.status_code}"
                continue
            if answer.status_code >= 400:
                raise self._refusal(answer)
            body = _json(answer)
            if isinstance(body, dict) and body.get("success") is not False:
                return body
            problem = "an answer that is not JSON" if body is None else f"no success: {str(body)[:200]}"
        raise ProviderError(
            f"no usable answer to {method} {path} in {_ATTEMPTS} attempts: {problem}",
            where=NAME,
            remedy=f"look at {CONSOLE}, and try again",
        )

    def elsewhere(self, url: str) -> str | None:
        """The text at a public address, asked for without the key; None where there is none yet."""
        try:
            answer = self._http.get(url, timeout=self._timeout)
        except self._http.HTTPError:
            return None
        return str(answer.text) if answer.status_code == 200 else None

    def _refusal(self, answer: Any) -> ProviderError:
        body = _json(answer)
        said = str(body.get("msg") or body.get("error") or "") if isinstance(body, dict) else ""
        if answer.status_code in (401, 403):
            return KeyRefusedError(
                f"the key is not accepted (status {answer.status_code}) {said}".strip(),
                where=NAME,
                remedy="check VAST_API_KEY, its permissions, and the account's credit",
            )
        return RefusedError(f"refused with status {answer.status_code}: {said}", where=NAME)


def _json(answer: Any) -> Any:
    """The body, or None where it is no JSON."""
    try:
        return answer.json()
    except ValueError:
        return None
