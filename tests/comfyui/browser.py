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

from .finding import PACK
from .server import fetched, free_port

LIMIT = 240  # seconds to wait for anything; a busy machine takes long to load the page
OPEN_DIALOGS = "[...document.querySelectorAll('[role=dialog]')].filter(d => d.getClientRects().length)"
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # unavailable in many containers; only a local server is opened
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
    "--window-size=1600,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",  # the page must work without the internet
)


class PageError(Exception):
    """A script failed in the page, or a wait timed out."""


class Page:
    """Opens with `with`. `errors` holds exceptions and console errors since it was last cleared."""

    def __init__(self, program: Path, profile: Path) -> None:
        self.errors: list[str] = []
        self.calls = 0
        self.port = free_port()
        words = [str(program), *FLAGS, f"--remote-debugging-port={self.port}", f"--user-data-dir={profile}"]
        with open(os.devnull, "wb") as nothing:
            self.process = subprocess.Popen([*words, "about:blank"], stdout=nothing, stderr=nothing)

    def __enter__(self) -> Page:
        try:
            self.connection = websocket.create_connection(self.address(), timeout=LIMIT, suppress_origin=True)
            for part in ("Runtime", "Log", "Page"):
                self.call(f"{part}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # shut down cleanly, so that its helper processes release the profile
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def address(self) -> str:
        """The address of the one page that the browser opens, once it is open."""
        limit = time.monotonic() + LIMIT
        while time.monotonic() < limit and self.process.poll() is None:
            with contextlib.suppress(OSError):
                targets = json.loads(fetched(f"http://127.0.0.1:{self.port}/json/list"))
                pages = [target for target in targets if target["type"] == "page"]
                if pages:
                    return pages[0]["webSocketDebuggerUrl"]
            time.sleep(0.2)
        raise PageError("the browser does not start")

    @property
    def version(self) -> str:
        return self.call("Browser.getVersion")["product"]

    def call(self, method: str, **parameters: Any) -> dict:
        """Send one command of the protocol; collects the page's errors meanwhile."""
        number = self.send(method, **parameters)
        while True:
            message = json.loads(self.connection.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise PageError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message.get("method"), message.get("params"))

    def send(self, method: str, **parameters: Any) -> int:
        self.calls += 1
        self.connection.send(json.dumps({"id": self.calls, "method": method, "params": parameters}))
        return self.calls

    def note(self, method: str, params: dict) -> None:
        if method == "Page.javascriptDialogOpening":  # whether to leave a changed workflow: everything would wait
            self.send("Page.handleJavaScriptDialog", accept=True)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(described(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description", ""))) for a in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def evaluate(self, script: str, **values: Any) -> Any:
        """Run the body of an async function that sees `values`, and return its result."""
        names = ", ".join(values)
        source = f"(async ({{{names}}}) => {{ {script} }})({json.dumps(values)})"
        done = self.call("Runtime.evaluate", expression=source, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise PageError(described(done["exceptionDetails"]))
        return done["result"].get("value")

    def wait_for(self, condition: str, **values: Any) -> None:
        """Wait until a JavaScript expression is true."""
        limit, last = time.monotonic() + LIMIT, ""
        while time.monotonic() < limit:
            try:
                if self.evaluate(f"return Boolean({condition})", **values):
                    return
                last = ""
            except PageError as error:  # a name in the condition may not exist yet
                last = f": {error}"
            time.sleep(0.2)
        raise PageError(f"not true after {LIMIT} s: {condition} {values or ''}{last}")

    def wait_until_quiet(self) -> None:
        """Wait until the page reports no error for three seconds; older errors are dropped."""
        for _ in range(20):
            self.errors.clear()
            time.sleep(3)
            self.evaluate("return 0")  # collects the errors since
            if not self.errors:
                return
        raise PageError(f"the page keeps reporting errors: {self.errors}")

    def press(self, key: str) -> None:
        """Press and release a key, such as Escape."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Escape": 27}[key])

    def write(self, text: str) -> None:
        """Put a text where the cursor is."""
        self.call("Input.insertText", text=text)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse at a place on the page, move it in steps, and release it."""

        def mouse(kind: str, part: float, buttons: int) -> None:
            x, y = (a + (b - a) * part for a, b in zip(start, end, strict=True))
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)
            time.sleep(0.2)  # the page follows the mouse in its own time

        mouse("mouseMoved", 0, 0)
        mouse("mousePressed", 0, 1)
        for part in (0.2, 0.4, 0.6, 0.8, 1):
            mouse("mouseMoved", part, 1)
        mouse("mouseReleased", 1, 0)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")


def open_workflow(page: Page, name: str) -> dict:
    """Open a shipped template in a tab of its own, and forget earlier errors. Returns the template."""
    saved = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.errors.clear()
    page.evaluate("await app.loadGraphData(saved, true, true, name)", saved=saved, name=name)
    return saved


def described(details: dict) -> str:
    return details.get("exception", {}).get("description") or details["text"]
