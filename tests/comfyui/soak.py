"""A soak: hundreds of prompts of several clients on one real server, which is then killed while it saves.

    python -m tests.comfyui.soak --comfyui CHECKOUT [--comfyui-python FILE] [--prompts 1000] [--seed 1] [--kills 10]

Run it by hand, from the root of the project: a thousand prompts take some 15 minutes on two free cores. Every prompt,
and what happens to it (an interrupt, a free, a delete, a lost connection), is a function of the seed and of its number;
only the order in which the clients come is not. At the end

- the memory of the server is back where it was after every workflow had run once,
- sampled results are those of the same prompt alone: word for word, and in pixels within the rounding of the prefix
  cache; without that cache bit for bit,
- every file in the output folder is whole, also after the server was killed in the middle of ten saves.

It prints a few lines and ends with 0, or with 1 if something of this is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from .finding import PACK, NotFound, add_options, found
from .server import Client, Server, ServerError
from .soak_prompts import KEPT, SMALL, any_prompt, is_of_small_model, kept, many_saves, one_of_each

CLIENTS = 4
LEGS = 10  # after each the memory is freed and measured
SAMPLED = 20
ROUNDING = 2  # of 255: what the prefix cache may change, as in test_queue.py
ALLOCATED_BOUND = 24  # MB above the start, of which the built-in model alone would take 27
MEMORY_BOUND = 96  # MB of RSS above the start: heaps of several threads come to have holes, which nothing gives back
# oneDNN and torch remember 1024 products of bf16 on a CPU each, by their shapes, and take half a megabyte for one.
FEW_REMEMBERED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
NO_REGION = "the mask is black everywhere"  # what Ming Edit says when a region of few steps marks nothing
DRAFT = ".ming-draft-"  # begins the name of a file that is being written
WAIT = 120  # seconds for something that happens at once

# What happens to a prompt, and how many of a hundred it happens to.
EVENTS = {"interrupt": 12, "free": 4, "delete from queue": 6, "delete from history": 6, "lost connection": 3}


# --- Clients ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a prompt gave, in the order of its nodes."""

    images: list[np.ndarray]
    texts: list[str]

    def difference(self, other: Result) -> float:
        """The largest difference of two pixels, 0 to 255; infinite for other words, or images of another size."""
        if self.texts != other.texts or [i.shape for i in self.images] != [i.shape for i in other.images]:
            return float("inf")
        pairs = zip(self.images, other.images, strict=True)
        return max((float(np.abs(image.astype(int) - same).max()) for image, same in pairs), default=0.0)


@dataclass
class Soak:
    """What is shared by the clients."""

    server: Server
    seed: int
    numbers: Iterator[int] = field(default_factory=lambda: iter(()))
    counts: Counter = field(default_factory=Counter)
    results: dict[int, Result] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def rng(self, number: int, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{number}/{what}")

    def prompt(self, number: int) -> dict:
        return any_prompt(self.rng(number, "prompt"))

    def event(self, number: int) -> str:
        chances = [*EVENTS.values(), 100 - sum(EVENTS.values())]
        return self.rng(number, "event").choices([*EVENTS, ""], chances)[0]

    def play_leg(self, numbers: Iterable[int]) -> None:
        """Have all clients play these prompts, and wait for them."""
        self.numbers = iter(numbers)
        clients = [threading.Thread(target=self.play) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()

    def next_number(self) -> int | None:
        with self.lock:
            return next(self.numbers, None)

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] += 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)

    def play(self) -> None:
        """One client: takes the next prompt until none is left."""
        try:
            while (number := self.next_number()) is not None:
                with self.server.client() as client:
                    self.play_with(client, number)
        except Exception as error:
            self.problem(f"a client stopped: {error!r}"[:3000])

    def play_with(self, client: Client, number: int) -> None:
        event, rng = self.event(number), self.rng(number, "moment")
        prompt_id = client.queue(self.prompt(number))
        if event == "delete from queue":
            self.server.post("/queue", {"delete": [prompt_id]})
        if event == "lost connection":
            self.count("connections lost")
            client.connection.close()
            history = self.wait_for_history(prompt_id)
        else:
            history = self.follow(client, prompt_id, event, rng)
        if history is None:
            self.count("deleted from the queue")
            return
        self.note_end(number, prompt_id, history)
        if event == "delete from history":
            self.server.post("/history", {"delete": [prompt_id]})
            self.count("deleted from the history")

    def follow(self, client: Client, prompt_id: str, event: str, rng: random.Random) -> dict | None:
        """Receive the events of a prompt, and disturb it after a few; None if it was deleted from the queue."""
        if event == "delete from queue" and self.was_deleted(prompt_id):
            return None
        after = rng.randint(0, 40)
        for seen, _ in enumerate(client.events(prompt_id)):
            if seen == after and event == "interrupt":
                self.server.post("/interrupt", {"prompt_id": prompt_id} if rng.random() < 0.5 else {})
                self.count("interrupts sent")
            elif seen == after and event == "free":
                self.server.post("/free", {"unload_models": True, "free_memory": rng.random() < 0.5})
                self.count("frees")
        return self.server.finished(prompt_id)

    def was_deleted(self, prompt_id: str) -> bool:
        """Whether a prompt is neither waiting nor running nor done. The order matters: it only moves that way."""
        queue = self.server.get("/queue")
        waiting = {entry[1] for entry in queue["queue_running"] + queue["queue_pending"]}
        return prompt_id not in waiting and prompt_id not in self.server.get(f"/history/{prompt_id}")

    def wait_for_history(self, prompt_id: str) -> dict:
        while self.is_waiting(prompt_id):
            time.sleep(0.3)
        return self.server.finished(prompt_id)

    def is_waiting(self, prompt_id: str) -> bool:
        queue = self.server.get("/queue")
        return any(entry[1] == prompt_id for entry in queue["queue_running"] + queue["queue_pending"])

    def note_end(self, number: int, prompt_id: str, history: dict) -> None:
        kinds = [kind for kind, _ in history["status"]["messages"]]
        if history["status"]["status_str"] == "success":
            self.count("done")
            self.results[number] = result(self.server, history)
        elif "execution_interrupted" in kinds:
            self.count("interrupted")
        elif NO_REGION in (what := json.dumps(history["status"]["messages"][-1])):
            self.count("found no region")
        else:
            self.count("failed")
            self.problem(f"prompt {number} failed: {what[:1500]}")


def result(server: Server, history: dict) -> Result:
    outputs = [output for _, output in sorted(history["outputs"].items())]
    images = [pixels(server.fetch("/view", **image)) for output in outputs for image in output.get("images", ())]
    texts = [text for output in outputs for text in output.get("text", ())]
    return Result(images, [text for text in texts if not text.endswith("[output]")])  # saved under a new name each time


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


# --- Memory -------------------------------------------------------------------------------------------------------


def freed_state(server: Server) -> dict:
    """The state of the server after its history and all models were let go."""
    assert server.post("/history", {"clear": True})[0] == 200
    limit = time.monotonic() + WAIT
    while True:
        assert server.post("/free", {"unload_models": True, "free_memory": True})[0] == 200
        time.sleep(1)
        state = server.get("/soak/state")
        if not any(state["live"].values()) or time.monotonic() > limit:
            return state


def in_words(state: dict) -> str:
    live = ", ".join(f"{count} {name}" for name, count in state["live"].items() if count) or "no model, no conversation"
    return (
        f"{state['rss_mb']:.0f} MB of RSS, {state['allocated_mb']:.1f} MB allocated, {state['tensors_mb']:.1f} MB of "
        f"tensors, {state['threads']} threads, "
        f"{state['files']} open files, alive: {live}"
    )


def memory_problems(start: dict, end: dict) -> list[str]:
    problems = []
    if end["rss_mb"] > start["rss_mb"] + MEMORY_BOUND:
        problems.append(f"RSS grew from {start['rss_mb']:.0f} to {end['rss_mb']:.0f} MB")
    if end["allocated_mb"] > start["allocated_mb"] + ALLOCATED_BOUND:
        problems.append(f"{start['allocated_mb']:.1f} MB were allocated, and now {end['allocated_mb']:.1f} MB are")
    if end["tensors_mb"] > start["tensors_mb"] + 1:
        problems.append(f"tensors grew from {start['tensors_mb']:.1f} to {end['tensors_mb']:.1f} MB")
    problems += [f"{count} {name} are alive after /free" for name, count in end["live"].items() if count]
    if end["files"] > start["files"]:
        problems.append(f"open files grew from {start['files']} to {end['files']}")
    return problems


# --- Files --------------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> list[str]:
    """Files that are not whole: a save node's and those that nobody asked for, such as temporary ones."""
    return [f"{path.name}: {why}" for path in sorted(folder.rglob("*")) if path.is_file() and (why := flaw(path))]


def flaw(path: Path) -> str:
    if path.name.startswith(DRAFT):  # what a killed server was writing: hidden, and removed by a save an hour later
        return ""
    if path.name.startswith(".") or path.suffix not in (".png", ".safetensors"):
        return f"a temporary file of {path.stat().st_size} bytes"
    try:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        else:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
                json.loads(file.metadata()["ming"])
                for name in names:
                    file.get_tensor(name)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, SafetensorError) as error:
        return f"{path.stat().st_size} bytes, {error or type(error).__name__}"
    return ""


# --- Kills --------------------------------------------------------------------------------------------------------


def killed_while_saving(server: Server, number: int) -> bool:
    """Kill the server as soon as a file is there that is not whole. Returns False if none was seen."""
    folder = server.base / "output" / "ming"
    known = set(folder.iterdir())
    skipped = random.Random(number).randint(0, 12)  # files to wait for first
    status, answer = server.post("/prompt", {"prompt": many_saves(number)})
    assert status == 200, answer
    limit = time.monotonic() + WAIT
    while time.monotonic() < limit:
        new = [path for path in folder.iterdir() if path not in known]
        if len(new) > skipped and any(is_unfinished(path) for path in new):
            break
    seen = time.monotonic() < limit
    server.process.kill()
    server.process.wait()
    return seen


def is_unfinished(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        return path.name.startswith(".") or path.stat().st_size == 0
    return False


# --- The whole ----------------------------------------------------------------------------------------------------


class Report:
    def __init__(self) -> None:
        self.problems: list[str] = []

    def line(self, name: str, text: str, problems: list[str]) -> None:
        self.problems += problems
        print(f"{'WRONG' if problems else 'right':6} {name}: {text}", flush=True)
        for problem in problems[:20]:
            print(f"       - {problem}", flush=True)


def soak(start: Callable[[], Server], base: Path, prompts: int, seed: int, kills: int) -> Report:
    report = Report()
    with start() as server:
        played = play_all(server, report, prompts, seed)
    # Random weights make other pictures of rounding, so the small model is compared bit for bit only.
    trained = [number for number in sorted(played.results) if not is_of_small_model(played.prompt(number))]
    with start() as server:
        compare_with_alone(server, report, played, sampled(trained, seed))
    with start() as server:
        compare_exactly(server, report, seed, sampled(sorted(played.results), seed))
    kill_and_look(start, base, report, kills)
    return report


def play_all(server: Server, report: Report, prompts: int, seed: int) -> Soak:
    for number in range(1, KEPT + 1):
        server.succeed(kept(number))
    for graph in one_of_each():  # twice, as some buffers are made at the second use
        server.succeed(graph)
        server.post("/free", {"unload_models": True, "free_memory": True})
    states = [freed_state(server)]
    played, began = Soak(server, seed), time.monotonic()
    for leg in range(LEGS):
        played.play_leg(range(prompts * leg // LEGS, prompts * (leg + 1) // LEGS))
        states.append(freed_state(server))
        print(f"       {prompts * (leg + 1) // LEGS} prompts; after /free {in_words(states[-1])}", flush=True)
    counts = ", ".join(f"{count} {what}" for what, count in sorted(played.counts.items()))
    report.line(
        "prompts", f"{prompts} of {CLIENTS} clients in {time.monotonic() - began:.0f} s: {counts}", played.problems
    )
    tracebacks = server.log.count("Traceback") - played.counts["found no region"]  # ComfyUI logs one for each error
    report.line("log", "no traceback", [f"the log has {tracebacks} tracebacks of no known error"] * bool(tracebacks))
    report.line(
        "memory",
        f"at the start {in_words(states[0])}; at the end {in_words(states[-1])}",
        memory_problems(states[0], states[-1]),
    )
    files = [path for path in (server.base / "output").rglob("*") if path.is_file()]
    report.line("files", f"{len(files)} in the output folder", broken_files(server.base / "output"))
    return played


def sampled(numbers: list[int], seed: int) -> list[int]:
    return random.Random(seed).sample(numbers, min(SAMPLED, len(numbers)))


def compare_with_alone(server: Server, report: Report, played: Soak, numbers: list[int]) -> None:
    """The same prompts on a fresh server, each after a /free; words are equal, and pixels within rounding."""
    differences = differences_from_alone(server, played, numbers)
    equal = sum(difference == 0 for difference in differences.values())
    text = f"{len(numbers)} sampled ones: {equal} are those of the prompt alone bit for bit, the largest difference is "
    text += f"{max(differences.values(), default=0):g} of 255"
    report.line("results", text, in_sentences(played, {n: d for n, d in differences.items() if d > ROUNDING}))


def compare_exactly(server: Server, report: Report, seed: int, numbers: list[int]) -> None:
    """The same without the prefix cache, whose keys and values may be rounded otherwise: bit for bit."""
    server.post("/soak/without_prefix_cache", {})
    played = Soak(server, seed)
    played.play_leg(numbers)
    differences = differences_from_alone(server, played, sorted(played.results))
    text = (
        f"{len(differences)} of the sampled ones again, by {CLIENTS} clients at once and alone, without a prefix cache"
    )
    others = {number: difference for number, difference in differences.items() if difference}
    report.line("bit for bit", text, played.problems + in_sentences(played, others))


def differences_from_alone(server: Server, played: Soak, numbers: Iterable[int]) -> dict[int, float]:
    found = {}
    for number in numbers:
        freed_state(server)
        alone = result(server, server.succeed(played.prompt(number)).history)
        found[number] = played.results[number].difference(alone)
    return found


def in_sentences(played: Soak, differences: dict[int, float]) -> list[str]:
    return [
        f"prompt {number} alone differs by {difference:g} of 255: {json.dumps(played.prompt(number))[:1500]}"
        for number, difference in differences.items()
    ]


def kill_and_look(start: Callable[[], Server], base: Path, report: Report, kills: int) -> None:
    """Kill servers in the middle of a save; then one more, which is not killed, saves and lists."""
    folder, seen, left = base / "output" / "ming", 0, 0
    for number in range(3 * kills):  # a kill may come between two saves
        if seen == kills:
            break
        with start() as server:
            seen += killed_while_saving(server, number)
            left = len(broken_files(folder))
    with start() as server:
        server.succeed(many_saves(kills))
        problems = broken_files(folder)
        listed = listed_files(server)
        problems += [f"{name} is listed" for name in listed if flaw(base / "output" / name.removesuffix(" [output]"))]
    if seen < kills:
        problems.append(f"only {seen} of {kills} kills were in the middle of a save")
    text = (
        f"{seen} in the middle of a save, which left {left} unfinished files; {len(listed)} files are listed afterwards"
    )
    report.line("kills", text, problems)


def listed_files(server: Server) -> list[str]:
    offered = server.get("/object_info")
    inputs = [offered[name]["input"]["required"] for name in ("MingLoadFeatures", "MingLoadConversation")]
    return [name for given in inputs for name in given["file"][0]]


@contextlib.contextmanager
def server_folder(keep: bool) -> Iterator[Path]:
    """A temporary base directory of a server, with the probe and the small model."""
    base = Path(tempfile.mkdtemp(prefix="ming-soak-"))
    (base / "custom_nodes").mkdir()
    shutil.copy(Path(__file__).with_name("soak_probe.py"), base / "custom_nodes")
    shutil.copytree(PACK / "tests" / "golden" / "edit_round", base / "models" / "ming" / SMALL)
    config = base / "models" / "ming" / SMALL / "config.json"
    keep_one_text_of_each_token(config.with_name("tokenizer.json"))
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096'))
    try:
        yield base
    finally:
        if keep:
            print(f"kept: {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)


def keep_one_text_of_each_token(file: Path) -> None:
    """The tokenizer of the recorded case has ids with two texts, and which of them a process writes is chance."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    texts = {number: text for text, number in reversed(tokenizer["model"]["vocab"].items())}
    tokenizer["model"]["vocab"] = {text: number for number, text in reversed(texts.items())}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--prompts", type=int, default=1000)
    words.add_argument("--seed", type=int, default=1)
    words.add_argument("--kills", type=int, default=10)
    add_options(words)
    words.add_argument("--keep", action="store_true", help="keep the server's folder, and name it")
    options = words.parse_args()
    try:
        checkout, python = found(options)
        os.environ.update(FEW_REMEMBERED)
        with server_folder(options.keep) as base:
            report = soak(lambda: Server(checkout, python, base), base, options.prompts, options.seed, options.kills)
    except (NotFound, ServerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if report.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
