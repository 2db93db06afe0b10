"""Drives a real server with clients that others wrote: text to image, and a chain of edits with words of one's own.

    python -m venv clients
    clients/bin/pip install comfy-cli comfykit comfyui-workflow-client
    python -m tests.comfyui.clients --clients clients/bin/python --comfyui CHECKOUT [--comfyui-python FILE]

Run it by hand, from the root of the project. Each client gets an API file as people would hand it over, with changed
words, and has to bring a picture, and from the chain the answer too. ComfyUI's own script comes with its checkout.
It prints a line for each client with its version, and ends with 0, or with 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from .finding import NotFound, add_options, found
from .server import Server, ServerError, read_workflow

DRAWN = 200  # the side of what is drawn, which tells it from other pictures
WORKFLOWS = {
    "text_to_image": {
        "3.prompt": "a small yellow star at the top on a navy background",
        "3.seed": 5,
        "3.steps": 4,
        "4.enlarge_to": DRAWN,
    },
    "multi_round_edit": {
        "2.scene": "a large green square at the left on a white background",
        "9.instruction": "Show the region to edit: Change the background to mint.",
        "11.instruction": "Change the background to mint.",
        "9.steps": 2,
        "11.steps": 2,
        "13.steps": 2,
        "14.enlarge_to": DRAWN,
        "11.seed": 7,
    },
}
LIMIT = 600  # seconds for one run of a client

# Every script gets: the server's host:port, the API file, and the folder to put pictures and answer.txt in.
SCRIPT_EXAMPLE = """
import re, sys
from pathlib import Path
source = (Path(checkout) / "script_examples" / "websockets_api_example.py").read_text()
source = source[: source.index("prompt_text =")].replace("127.0.0.1:8188", address)
exec(source)
import json, websocket
ws = websocket.WebSocket()
ws.connect(f"ws://{address}/ws?clientId={client_id}", http_no_proxy=["127.0.0.1"])
workflow = json.loads(Path(file).read_text())
images = get_images(ws, workflow)
ws.close()
save_pictures([image for pictures in images.values() for image in pictures])
print("VERSION", "of the checkout")
# the script keeps images only: texts are in the history that it has read
with urllib.request.urlopen(f"http://{address}/history") as answer:
    outputs = [entry["outputs"] for entry in json.loads(answer.read()).values()][-1]
save_texts([text for output in outputs.values() for text in output.get("text", ())])
"""
COMFYKIT = """
import asyncio, importlib.metadata
from comfykit import ComfyKit
async def main():
    kit = ComfyKit(comfyui_url=f"http://{address}")
    done = await kit.execute(file)
    assert done.status == "completed", done
    import urllib.request
    save_pictures([urllib.request.urlopen(image).read() for image in done.images])
    save_texts(done.texts)
asyncio.run(main())
print("VERSION", importlib.metadata.version("comfykit"))
"""
WORKFLOW_CLIENT = """
import importlib.metadata, io
from comfyuiclient import ComfyUIClient
client = ComfyUIClient(address, file)
client.connect()
done = client.generate(["SaveImage", "PreviewAny"])  # nodes by their class or title
client.close()
pictures = []
for value in done.values():
    if hasattr(value, "save"):
        pictures.append(io.BytesIO())
        value.save(pictures[-1], "PNG")
save_pictures([picture.getvalue() for picture in pictures])
texts = [value for value in done.values() if not hasattr(value, "save")]
save_texts([text for value in texts for text in ([value] if isinstance(value, str) else value)])
print("VERSION", importlib.metadata.version("comfyui-workflow-client"))
"""
COMFY_CLI = """
import importlib.metadata, json, subprocess, urllib.request
host, port = address.split(":")
comfy = str(Path(sys.executable).with_name("comfy"))
words = [comfy, "--skip-prompt", "run", "--workflow", file, "--wait", "--host", host, "--port", port]
done = subprocess.run([*words, "--timeout", "300"], capture_output=True, text=True)
print(done.stdout[-2000:], done.stderr[-1000:])
assert done.returncode == 0
with urllib.request.urlopen(f"http://{address}/history") as answer:
    outputs = [entry["outputs"] for entry in json.loads(answer.read()).values()][-1]
saved = [image for output in outputs.values() for image in output.get("images", ()) if image["type"] == "output"]
assert saved[0]["filename"] in done.stdout.replace("\\n", ""), "comfy run does not name the picture"
query = "&".join(f"{key}={value}" for key, value in saved[0].items())
save_pictures([urllib.request.urlopen(f"http://{address}/view?{query}").read()])
save_texts([text for output in outputs.values() for text in output.get("text", ())])
print("VERSION", importlib.metadata.version("comfy-cli"))
"""
HEAD = """
import re, sys
from pathlib import Path
address, file, folder, checkout = sys.argv[1:]
def save_pictures(pictures):
    for number, data in enumerate(pictures):
        Path(folder, f"{number}.png").write_bytes(data)
def save_texts(texts):
    Path(folder, "answer.txt").write_text("\\n".join(map(str, texts)), encoding="utf-8")
"""
CLIENTS = {
    "ComfyUI's script example": SCRIPT_EXAMPLE,
    "comfy-cli": COMFY_CLI,
    "comfykit": COMFYKIT,
    "comfyui-workflow-client": WORKFLOW_CLIENT,
}


def drive(server: Server, python: Path, script: str, name: str, folder: Path) -> str:
    """One client runs one workflow. Returns its version; raises AssertionError with what it said."""
    folder.mkdir()
    file = folder / f"{name}.json"
    file.write_text(json.dumps(read_workflow(name, WORKFLOWS[name])), encoding="utf-8")
    words = [
        str(python),
        "-c",
        HEAD + script,
        server.url.removeprefix("http://"),
        str(file),
        str(folder),
        str(server.checkout),
    ]
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert done.returncode == 0, said
    sizes = [Image.open(picture).size for picture in folder.glob("*.png")]
    assert (DRAWN, DRAWN) in sizes, f"no drawing among pictures of {sizes}: {said}"
    if name == "multi_round_edit":
        assert "green square" in (folder / "answer.txt").read_text(encoding="utf-8"), said
    return re.findall("VERSION (.+)", done.stdout)[-1]


def drive_all(checkout: Path, comfyui_python: Path, python: Path, folder: Path) -> int:
    """Every client runs every workflow. Returns how many runs failed."""
    failed = 0
    with Server(checkout, comfyui_python, folder / "base") as server:
        print(f"ComfyUI {server.version}")
        for number, (client, name) in enumerate((client, name) for client in CLIENTS for name in WORKFLOWS):
            try:
                version = drive(server, python, CLIENTS[client], name, folder / str(number))
                print(f"right  {client} {version}: {name}", flush=True)
            except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
                failed += 1
                print(f"WRONG  {client}: {name}: {error}", flush=True)
    return failed


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--clients", metavar="FILE", required=True, type=Path, help="the Python that has the clients")
    add_options(words)
    options = words.parse_args()
    try:
        checkout, python = found(options)
        with tempfile.TemporaryDirectory(prefix="ming-clients-") as folder:
            failed = drive_all(checkout, python, options.clients.absolute(), Path(folder))
    except (NotFound, ServerError) as error:
        print(error, file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
