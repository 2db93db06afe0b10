"""Two servers behind one client: a conversation that was saved on one goes on on the other."""

from __future__ import annotations

import io
import shutil

from ming_univision.tests.comfyui.server import Server
from PIL import Image, ImageChops

EDIT = "9"  # the second round of save_and_continue


def moved(source: Server, target: Server, name: str) -> str:
    """Copies a saved file to the other server's input folder, as a shared disk or an upload does; its name there."""
    (saved,) = (source.base / "output" / "ming").glob(f"{name}_0*.safetensors")
    shutil.copy(saved, target.base / "input" / f"{name}.safetensors")
    return f"{name}.safetensors [input]"


def test_a_saved_conversation_goes_on_on_another_server_as_it_would_have_on_the_first(
    server, server_without_previews, workflow
):
    other = server_without_previews
    whole = workflow("save_and_continue", {"8.filename_prefix": "handed_over", f"{EDIT}.steps": 2})
    done = server.succeed(whole)
    (expected,) = done.outputs["13"]["images"]

    name = moved(server, other, "handed_over")
    try:
        edit = {key: value for key, value in whole[EDIT]["inputs"].items() if key != "features"}  # it is in the past
        prompt = {
            "1": whole["1"],
            "load": {"class_type": "MingLoadConversation", "inputs": {"model": ["1", 0], "file": name}},
            EDIT: {"class_type": "MingEdit", "inputs": edit | {"conversation": ["load", 0]}},
            "12": whole["12"],
            "13": whole["13"],
        }
        continued = other.succeed(prompt)
        (found,) = continued.outputs["13"]["images"]
        # The first has the keys of its own answer, written token by token; the other reads the answer at once.
        difference = ImageChops.difference(picture(other, found), picture(server, expected))
        assert max(high for _, high in difference.getextrema()) <= 1  # of 255
    finally:
        (other.base / "input" / "handed_over.safetensors").unlink()  # the others start from an empty folder


def picture(server: Server, image: dict) -> Image.Image:
    with Image.open(io.BytesIO(server.fetch("/view", **image))) as opened:
        return opened.convert("RGB")
