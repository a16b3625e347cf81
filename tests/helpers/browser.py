"""A real browser: Debian's chromium, through its driver and the WebDriver protocol."""

from __future__ import annotations

import base64
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests

from .loads import wait_until
from .requirements import need_program

__all__ = ["Browser", "open_browser"]

#: Events of scrolling and resizing come with a frame: with the second one, they have been handled.
_TWO_FRAMES = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"


class Browser:
    """A window without a screen.

    Parameters
    ----------
    url : str
        The address of the driver's session.
    http : requests.Session
    """

    def __init__(self, url: str, http: requests.Session) -> None:
        self._url, self._http = url, http

    def call(self, command: str, **arguments: Any) -> Any:
        """Send a command of the protocol, and return its value."""
        answer = self._http.post(f"{self._url}/{command}", json=arguments, timeout=60)
        assert answer.ok, answer.text
        return answer.json()["value"]

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is loaded."""
        self.call("url", url=path.as_uri())

    def run(self, script: str) -> Any:
        """Run JavaScript in the page, and return its result."""
        return self.call("execute/sync", script=script, args=[])

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.call("goog/cdp/execute", cmd=command, params=parameters)

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """Let the page believe that it is on a screen of this size, light or dark."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse, and wait until the page has handled that."""
        self.call("execute/async", script=_TWO_FRAMES, args=[])
        self.run("window.pointed = null; window.onpointermove = event => { window.pointed = [event.x, event.y] }")
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

        def is_handled() -> bool:
            found = self.run("return window.pointed")
            return found is not None and abs(found[0] - x) <= 1 and abs(found[1] - y) <= 1

        wait_until(is_handled)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the page's own thread until now. A machine busy with other things does not matter."""
        found = self.devtools("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in found if metric["name"] == "TaskDuration"))

    def messages(self) -> list[str]:
        """Return what the console says since the last call."""
        return [entry["message"] for entry in self.call("se/log", type="browser")]

    def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        found = self.devtools("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(found["data"])


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start chromium and its driver; end both with the block."""
    driver = need_program("chromedriver")
    options = {
        "binary": need_program("chromium"),
        "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"],
    }
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    with (
        subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process,
        requests.Session() as http,
    ):
        http.trust_env = False  # no proxy
        try:
            assert process.stdout is not None
            port = next(
                found[1] for line in process.stdout if (found := re.search(r"successfully on port (\d+)", line))
            )
            root = f"http://127.0.0.1:{port}/session"
            started = http.post(root, json={"capabilities": {"alwaysMatch": wanted}}, timeout=60)
            assert started.ok, started.text
            url = f"{root}/{started.json()['value']['sessionId']}"
            try:
                yield Browser(url, http)
            finally:
                http.delete(url, timeout=60)
        finally:
            process.terminate()
