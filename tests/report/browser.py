"""A headless Chromium for the tests of the page, driven through chromedriver. Nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REQUIRED = "REQUIRE_CHROMIUM"  # set by .ci/run: there a missing browser is a failure, not a skip
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def missing() -> str | None:
    """Why there is no browser; None where there is one."""
    lacking = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"no {' and no '.join(lacking)} here (Debian: chromium, chromium-driver)" if lacking else None


class Browser:
    """A session of chromedriver."""

    def __init__(self, port: int, profile: str) -> None:
        self._url = f"http://127.0.0.1:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        told = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{told['sessionId']}"

    def open(self, path: Path, fragment: str = "") -> None:
        """Returns once the page has loaded."""
        self._ask("POST", "/url", {"url": path.as_uri() + fragment})

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def later(self, script: str) -> Any:
        """The value that a script hands to its last argument."""
        return self._ask("POST", "/execute/async", {"script": script, "args": []})

    def cdp(self, command: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": arguments})

    def complaints(self) -> list[str]:
        """What the console said since it was last asked."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """Addresses that were asked for since this was last asked, those of the browser's own page apart."""
        entries = self._ask("POST", "/se/log", {"type": "performance"})
        told = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [
            str(one["params"]["request"]["url"])
            for one in told
            if one["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("chrome://", "data:"))]

    def tab(self) -> str:
        """Press Tab; what has the focus then."""
        for kind in ("rawKeyDown", "keyUp"):
            self.cdp("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        return str(
            self.run("const e = document.activeElement; return e.id || e.getAttribute('href') || e.tagName")
        )

    def close(self) -> None:
        """End the session, and with it the browser."""
        self._ask("DELETE", "", None)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A new browser with an empty profile; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gputrain-browser-", ignore_cleanup_errors=True) as profile:
        command = ["chromedriver", "--port=0"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as driver:
            try:
                assert driver.stdout is not None
                port = next(
                    int(line.rsplit(" ", 1)[1].rstrip(".\n"))
                    for line in driver.stdout
                    if "on port" in line and "success" in line
                )
                opened = Browser(port, profile)
                try:
                    yield opened
                finally:
                    opened.close()
            finally:
                driver.terminate()
