"""A headless Chromium for tests, spoken to over a pipe in the DevTools protocol: no driver is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_SECONDS = 60.0


class Browser:
    """One page in one browser; everything that goes wrong in it is collected."""

    def __init__(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        assert CHROMIUM is not None
        self.problems: list[str] = []
        """Console errors, exceptions, refusals of the page's policy."""
        self.requests: list[str] = []
        """Addresses that the page asked for, itself included."""
        self._profile = tempfile.mkdtemp(prefix="lorasmith-chromium-")
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        self._process = _spawn(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile}", "about:blank"], to_browser, from_browser
        )
        os.close(to_browser)
        os.close(from_browser)
        self._number = 0
        self._buffer = b""
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        target = next(t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path) -> None:
        """Load a file and wait until it has loaded."""
        self._events.clear()
        self._call("Page.navigate", url=page.resolve().as_uri())
        self._wait_for(lambda: any(event["method"] == "Page.loadEventFired" for event in self._events))

    def run(self, expression: str) -> Any:
        """Evaluate JavaScript (a promise is awaited); raises on an exception."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until the expression is true, and return it."""
        found: list[Any] = []

        def holds() -> bool:
            found[:] = [self.run(expression)]
            return bool(found[0])

        self._wait_for(holds)
        return found[0]

    def emulate_media(self, media: str) -> None:
        """`print`, or the empty string for the screen again."""
        self._call("Emulation.setEmulatedMedia", media=media)

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """What the window shows, or the whole page, as PNG."""
        data = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(data["data"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._write)
        with suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        os.close(self._read)
        shutil.rmtree(self._profile, ignore_errors=True)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, condition: Any) -> None:
        end = time.monotonic() + _SECONDS
        while not condition():
            if time.monotonic() > end:
                raise AssertionError("the page did not get there in time")
            if self._buffer or select.select([self._read], [], [], 0.02)[0]:
                self._receive()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], _SECONDS)
            piece = os.read(self._read, 1 << 20) if ready else b""
            if not piece:
                raise AssertionError("the browser does not answer")
            self._buffer += piece
        raw, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(raw)
        if "method" in message:
            self._note(message)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        params = event["params"]
        match event["method"]:
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.problems.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])


def _spawn(command: list[str], commands: int, answers: int) -> int:
    """Start the browser, which reads commands from descriptor 3 and answers on 4; returns its process id."""
    # Out of the way of 3 and 4 first: a pipe may have been given one of these numbers.
    commands, answers = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, answers))
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    ends = [(os.POSIX_SPAWN_DUP2, commands, 3), (os.POSIX_SPAWN_DUP2, answers, 4)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=[*quiet, *ends])
    os.close(commands)
    os.close(answers)
    return process
