"""A headless Chromium, driven over its debugging pipe: no package and no port is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium() -> str:
    """The browser's path; skips the test where there is none."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"no browser is installed (none of {', '.join(NAMES)} is in PATH)")


class Chromium:
    """One browser with one page. ``call`` sends a command of the DevTools protocol and returns its result."""

    def __init__(self, profile: Path) -> None:
        to_browser, to_us = os.pipe(), os.pipe()
        flags = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        # The protocol's pipes are file descriptors 3 and 4, which only the shell can number.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser[0]} 4>&{to_us[1]}', "-", find_chromium(), *flags],
            pass_fds=(to_browser[0], to_us[1]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=(profile.parent / "chromium.txt").open("wb"),
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(to_us[1])
        self._out, self._in = os.fdopen(to_browser[1], "wb"), os.fdopen(to_us[0], "rb")
        self._left = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank", session=None)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True, session=None)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *error: object) -> None:
        self._out.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._in.close()

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = self._in.read1(1 << 16)
            if not part:
                raise RuntimeError("Chromium is gone; what it said is in chromium.txt")
            self._left += part
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)

    def call(self, method: str, session: str | None = "", **params: Any) -> dict[str, Any]:
        """One command; events that arrive before its answer are kept in ``events``."""
        self._count += 1
        words = {"id": self._count, "method": method, "params": params}
        if session is not None:
            words["sessionId"] = session or self.session
        self._out.write(json.dumps(words).encode() + b"\0")
        self._out.flush()
        while True:
            message = self._message()
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def open(self, url: str, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Load a page at this width (CSS pixels) and wait until it is loaded with all its pictures."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())
        self.ask(
            "document.fonts.ready.then(() => Promise.all([...document.images].map(i => i.decode().catch(() => 0))))"
        )

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["text"])
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page has logged: errors and warnings of scripts, of the policy, of what did not load."""
        said = []
        for event in self.events:
            if event["method"] == "Log.entryAdded":
                said.append(event["params"]["entry"]["text"])
            elif event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                said.append(json.dumps(event["params"])[:300])
            elif event["method"] == "Network.loadingFailed":
                said.append(event["params"]["errorText"])
        return said

    def requests(self) -> list[str]:
        """Every address the page asked for."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
