"""A real ComfyUI server with its own base directory, and a client of its queue."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import websocket

from .finding import PACK, has_gpu, remedy

API_WORKFLOWS = {file.stem: file for file in sorted((PACK / "workflows" / "api").glob("*.json"))}

START_LIMIT = 600  # seconds for a server to start; a cold disk can take minutes
SILENCE_LIMIT = 300  # seconds without any event while a prompt runs
ENDS = ("execution_success", "execution_error", "execution_interrupted")
# Types of binary events, their first 4 bytes: 4 bytes format and a picture; 4 bytes length, a node's id and a text.
PREVIEW, TEXT = 1, 3

# The machine's proxy settings are not for this machine's own servers.
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """The server did not start, or stopped; the message ends with its log."""


class Event(NamedTuple):
    kind: str  # "executing", "progress", ... as the server names it; "preview": a picture file; "text": (node, text)
    data: Any


class Run(NamedTuple):
    """The result of one prompt: its websocket events in order, and its history entry."""

    prompt_id: str
    events: list[Event]
    history: dict

    @property
    def end(self) -> Event:
        return self.events[-1]

    @property
    def ran(self) -> set[str]:
        """Ids of the nodes that were executed, not taken from the cache."""
        return {e.data["node"] for e in self.events if e.kind == "executing" and e.data["node"]}

    @property
    def cached(self) -> set[str]:
        return {node for e in self.events if e.kind == "execution_cached" for node in e.data["nodes"]}

    def progress(self, node: str) -> list[tuple[int, int]]:
        """(value, maximum) of every update of the node's bar."""
        updates = [e.data for e in self.events if e.kind == "progress"]
        return [(d["value"], d["max"]) for d in updates if d["node"] == node]

    @property
    def previews(self) -> list[bytes]:
        return [e.data for e in self.events if e.kind == "preview"]

    def texts(self, node: str) -> list[str]:
        """The texts shown on a node."""
        return [text for shown_on, text in (e.data for e in self.events if e.kind == "text") if shown_on == node]

    @property
    def outputs(self) -> dict:
        return self.history["outputs"]

    @property
    def images(self) -> list[dict]:
        """{"filename", "subfolder", "type"} of every image that was saved or previewed."""
        return [image for output in self.outputs.values() for image in output.get("images", ())]


class Server:
    """A context manager: starts ComfyUI with this pack as the only custom node, and always stops it."""

    def __init__(self, checkout: Path, python: Path, base: Path, *flags: str) -> None:
        self.checkout, self.python, self.base, self.flags = checkout, python, base, flags
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)  # they exist after an earlier server
        install_pack(self.base / "custom_nodes" / PACK.name)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), cwd=self.checkout, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self.wait_until_it_answers()
            self.startup_log = self.log
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def command(self) -> list[str]:
        database = f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"
        words = [str(self.python), "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        words += ["--base-directory", str(self.base), "--database-url", database]
        words += ["--disable-auto-launch", "--disable-api-nodes", *self.flags]
        return words if has_gpu(self.python, self.checkout) else [*words, "--cpu"]

    def wait_until_it_answers(self) -> None:
        limit = time.monotonic() + START_LIMIT
        while True:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while it started. {self.advice()}\n{self.log[-3000:]}")
            with contextlib.suppress(OSError):
                self.get("/object_info")
                return
            if time.monotonic() > limit:
                raise ServerError(f"ComfyUI does not answer after {START_LIMIT} s.\n{self.log[-3000:]}")
            time.sleep(0.3)

    def advice(self) -> str:
        """Advice about a missing module, if the log names one."""
        missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", self.log)
        if not missing:
            return ""
        by_itself = f"If it is still missing after that: {self.python} -m pip install {missing[1]}"
        return f"It lacks the module {missing[1]}. {remedy(self.python, self.checkout)}\n{by_itself}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log_file(self) -> Path:
        return self.base / "server.log"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @cached_property
    def version(self) -> str:
        return self.get("/system_stats")["system"]["comfyui_version"]

    # --- What a client does -------------------------------------------------------------------------------------------

    def fetch(self, path: str, **query: str) -> bytes:
        return fetched(f"{self.url}{path}?{urllib.parse.urlencode(query)}")

    def get(self, path: str) -> Any:
        return json.loads(self.fetch(path))

    def post(self, path: str, body: dict) -> tuple[int, Any]:
        """Return (status, answer), also for a rejected request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            status, answer = 200, fetched(request)
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        return status, json.loads(answer) if answer else None

    @contextlib.contextmanager
    def client(self, name: str | None = None) -> Iterator[Client]:
        """A connection that receives the events of the prompts queued under its name."""
        name = name or uuid.uuid4().hex
        connection = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={name}", timeout=SILENCE_LIMIT, http_no_proxy=["127.0.0.1"]
        )
        try:
            yield Client(self, name, connection)
        finally:
            connection.close()

    def run(self, prompt: dict) -> Run:
        with self.client() as client:
            return client.follow(client.queue(prompt))

    def succeed(self, prompt: dict) -> Run:
        done = self.run(prompt)
        assert done.end.kind == "execution_success", done.end
        return done

    def stopped(self, why: object) -> ServerError:
        """The error to raise when the server goes away during a prompt."""
        return ServerError(f"ComfyUI stopped while it ran a prompt ({why}).\n{self.log[-3000:]}")

    def finished(self, prompt_id: str) -> dict:
        """Wait for the prompt's history entry, which is written just after its last event."""
        limit = time.monotonic() + SILENCE_LIMIT
        while time.monotonic() < limit:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise ServerError(f"The prompt {prompt_id} never appeared in the history.\n{self.log[-3000:]}")


class Client(NamedTuple):
    server: Server
    name: str
    connection: websocket.WebSocket

    def queue(self, prompt: dict) -> str:
        """Queue a prompt; returns its prompt_id."""
        status, answer = self.server.post("/prompt", {"prompt": prompt, "client_id": self.name})
        assert status == 200, answer
        return answer["prompt_id"]

    def events(self, prompt_id: str) -> Iterator[Event]:
        """The events of this prompt, up to its end."""
        while True:
            try:
                code, data = self.connection.recv_data()
            except websocket.WebSocketException as error:
                raise self.server.stopped(error) from error
            if code == websocket.ABNF.OPCODE_CLOSE:
                raise self.server.stopped("it has closed the connection")
            if code == websocket.ABNF.OPCODE_BINARY:
                kind, number = (int.from_bytes(data[at : at + 4], "big") for at in (0, 4))
                if kind == PREVIEW:
                    yield Event("preview", data[8:])
                elif kind == TEXT:
                    yield Event("text", (data[8 : 8 + number].decode(), data[8 + number :].decode()))
                continue
            message = json.loads(data)
            if message.get("data", {}).get("prompt_id", prompt_id) != prompt_id:
                continue
            yield Event(message["type"], message["data"])
            if message["type"] in ENDS:
                return

    def follow(self, prompt_id: str) -> Run:
        return Run(prompt_id, list(self.events(prompt_id)), self.server.finished(prompt_id))


def read_workflow(name: str, changes: dict | None = None) -> dict:
    """A shipped workflow in the API format, with changed inputs: read_workflow("text_to_image", {"3.seed": 5})."""
    prompt = json.loads(API_WORKFLOWS[name].read_text(encoding="utf-8"))
    for key, value in (changes or {}).items():
        node, socket = key.split(".")
        prompt[node]["inputs"][socket] = value
    return prompt


def install_pack(place: Path) -> None:
    """Install the pack as users do: a link where the system allows one, else a copy."""
    if place.exists():
        return
    try:
        place.symlink_to(PACK, target_is_directory=True)
    except OSError:
        ignored = (
            "__pycache__",
            "output",
            "input",
            "runs",
            "checkpoints",
        )  # and many GB of downloaded models
        others = (path.name for path in (PACK / "models").iterdir() if path.name not in ("tiny-shapes", "loras"))
        shutil.copytree(PACK, place, ignore=shutil.ignore_patterns(".*", *ignored, *others))


def fetched(request: str | urllib.request.Request) -> bytes:
    with LOCAL.open(request, timeout=60) as answer:
        return answer.read()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
