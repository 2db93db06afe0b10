"""A page in a headless Chromium, Chrome or Edge, driven over the DevTools protocol: no driver to install."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import websocket

from .server import fetched, free_port

LIMIT = 60  # seconds until something that is waited for must have happened
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which is not to be had in many containers; only this machine's server is opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--window-size=1600,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # the page is to work without the internet
)


class PageError(Exception):
    """A script failed in the page, or what was waited for did not happen."""


class Page:
    """Opens with `with`. `errors` are the exceptions and the console's errors since it was last cleared."""

    def __init__(self, program: Path, profile: Path) -> None:
        self.errors: list[str] = []
        self.calls = 0
        self.port = free_port()
        words = [str(program), *FLAGS, f"--remote-debugging-port={self.port}", f"--user-data-dir={profile}"]
        with open(os.devnull, "wb") as nothing:
            self.process = subprocess.Popen([*words, "about:blank"], stdout=nothing, stderr=nothing)

    def __enter__(self) -> Page:
        try:
            self.heard = websocket.create_connection(self.address(), timeout=LIMIT, suppress_origin=True)
            for part in ("Runtime", "Log", "Page"):
                self.call(f"{part}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # the polite way, in which its helpers end and its profile is left alone
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def address(self) -> str:
        """Of the one page that the browser opened, as soon as there is one."""
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit and self.process.poll() is None:
            with contextlib.suppress(OSError):
                told = json.loads(fetched(f"http://127.0.0.1:{self.port}/json/list"))
                pages = [target for target in told if target["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.2)
        raise PageError("the browser does not start")

    @property
    def version(self) -> str:
        return self.call("Browser.getVersion")["product"]

    def call(self, method: str, **parameters: Any) -> dict:
        """One command of the protocol; what the page says meanwhile is noted."""
        self.calls += 1
        self.heard.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.heard.recv())
            if message.get("id") == self.calls:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message.get("method"), message.get("params"))

    def note(self, method: str, said: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(described(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")

    def evaluate(self, script: str, **values: Any) -> Any:
        """Runs the body of an async function that sees `values`; gives what it returns."""
        names = ", ".join(values)
        source = f"(async ({{{names}}}) => {{ {script} }})({json.dumps(values)})"
        done = self.call("Runtime.evaluate", expression=source, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise PageError(described(done["exceptionDetails"]))
        return done["result"].get("value")

    def wait_for(self, condition: str, **values: Any) -> None:
        """Until a JavaScript expression is true."""
        limit, last = time.monotonic() + LIMIT, ""
        while time.monotonic() < limit:
            try:
                if self.evaluate(f"return Boolean({condition})", **values):
                    return
                last = ""
            except PageError as error:  # what is waited for may not even have a name yet
                last = f": {error}"
            time.sleep(0.2)
        raise PageError(f"after {LIMIT} s there was still no: {condition} {values or ''}{last}")

    def wait_until_quiet(self) -> None:
        """Until nothing more is said for three seconds; then forgets what was said."""
        for _ in range(LIMIT // 3):
            self.errors.clear()
            time.sleep(3)
            self.evaluate("return 0")  # fetches what was said meanwhile
            if not self.errors:
                return
        raise PageError(f"the page does not come to rest: {self.errors}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")


def described(details: dict) -> str:
    return details.get("exception", {}).get("description") or details["text"]
