"""Drives headless Chromium through chromedriver: a page, what its console says, what it asked a network for."""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "DRIVER", "Browser", "browser"]

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DRIVER = shutil.which("chromedriver")
LOGS = {"browser": "ALL", "performance": "ALL"}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser's own errands stay on this machine
)


@dataclass(frozen=True)
class Browser:
    """One session."""

    port: int
    session: str

    def open(self, address: str) -> None:
        """Load a page."""
        self._post("url", {"url": address})

    def run(self, script: str) -> Any:
        """The value that a function body returns in the page."""
        return self._post("execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str, seconds: float = 30.0) -> None:
        """Wait until a function body returns something true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.1)

    def console(self) -> list[str]:
        """What has been said on the console since the last call."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self._post("se/log", {"type": "performance"})]
        asked = [each["params"]["request"]["url"] for each in entries if each["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("chrome:", "data:"))]  # the browser's own first page

    def save_picture(self, path: Path) -> None:
        """A picture of what the window shows."""
        path.write_bytes(base64.b64decode(_request(self.port, "GET", f"/session/{self.session}/screenshot")))

    def _post(self, verb: str, content: Mapping[str, Any]) -> Any:
        return _request(self.port, "POST", f"/session/{self.session}/{verb}", content)


@contextmanager
def browser(folder: Path, *, width: int = 1400, height: int = 1000, dark: bool = False) -> Iterator[Browser]:
    """A browser with an empty profile; narrow ones are phones."""
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    options: dict[str, Any] = {"binary": CHROMIUM, "args": flags}
    if width < 500:
        options["mobileEmulation"] = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 1.0}}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": LOGS}
    driver = subprocess.Popen([str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert driver.stdout is not None
        port = next(
            int(found[1]) for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line))
        )
        session = _request(port, "POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        try:
            yield Browser(port, session)
        finally:
            _request(port, "DELETE", f"/session/{session}")
    finally:
        driver.terminate()
        driver.wait()
        if driver.stdout is not None:
            driver.stdout.close()


def _request(port: int, method: str, path: str, content: Mapping[str, Any] | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, json.dumps(content) if content is not None else None)
        answer = json.loads(connection.getresponse().read())["value"]
    finally:
        connection.close()
    assert not (isinstance(answer, dict) and "error" in answer), answer
    return answer
