"""LoRAs from ComfyUI's own folder: listed, stacked, and two branches of a graph on one model."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from ming_univision.ming_core import load_univision
from ming_univision.tests.comfyui.finding import PACK
from ming_univision.tests.comfyui.server import Server
from ming_univision.tests.loras import write_lora
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def loras(server: Server) -> list[str]:
    """The names of two LoRAs for the built-in model; each changes it much."""
    network = load_univision(PACK / "models" / "tiny-shapes").network
    folder = server.base / "models" / "loras" / "ming"
    for seed, name in enumerate(("one", "two")):
        write_lora(folder / f"{name}.safetensors", network, seed=seed)
    return ["ming/one.safetensors", "ming/two.safetensors"]


def test_branches_with_other_loras_draw_other_pictures_on_one_model(server, workflow, loras):
    prompt = workflow("text_to_image")
    (loader,) = (i for i, node in prompt.items() if node["class_type"] == "MingUniVisionLoader")
    (draw,) = (i for i, node in prompt.items() if node["class_type"] == "MingGenerate")

    def lora(model: str, name: str, strength: float) -> dict:
        inputs = {"model": [model, 0], "lora_name": name, "strength": strength}
        return {"class_type": "MingLoraLoader", "inputs": inputs}

    branches = {"none": loader, "zero": "z", "one": "a", "one, two": "ab", "two, one": "ba"}
    prompt |= {
        "z": lora(loader, loras[0], 0.0),
        "a": lora(loader, loras[0], 1.0),
        "ab": lora("a", loras[1], -0.5),
        "b": lora(loader, loras[1], -0.5),
        "ba": lora("b", loras[0], 1.0),
    }
    for name, model in branches.items():
        prompt[f"draw {name}"] = {
            "class_type": "MingGenerate",
            "inputs": prompt[draw]["inputs"] | {"model": [model, 0], "steps": 4},
        }
        decode = {"mingtok": [loader, 1], "features": [f"draw {name}", 0]}
        prompt[f"decode {name}"] = {"class_type": "MingTokDecode", "inputs": decode}
        prompt[f"show {name}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"decode {name}", 0]}}
    log_before = len(server.log)
    done = server.succeed(prompt)
    pictures = {}
    for name in branches:
        (shown,) = done.outputs[f"show {name}"]["images"]
        with Image.open(io.BytesIO(server.fetch("/view", **shown))) as image:
            pictures[name] = np.asarray(image).astype(int)

    def apart(one: str, other: str) -> int:
        return np.abs(pictures[one] - pictures[other]).max()

    # of 255: keys and values that an earlier branch remembered differ by rounding
    assert apart("none", "zero") <= 2 and apart("one, two", "two, one") <= 2
    assert min(apart("none", "one"), apart("one", "one, two"), apart("none", "one, two")) > 20
    assert server.log[log_before:].count("Requested to load") <= 1


def test_loras_that_come_with_the_pack_are_offered_to_ming_and_core_nodes_and_work(server, workflow):
    ours = {file.name for file in (PACK / "models" / "loras").glob("*.safetensors")}
    for node in ("MingLoraLoader", "LoraLoader"):
        assert ours and ours <= set(server.get(f"/object_info/{node}")[node]["input"]["required"]["lora_name"][0])
    prompt = workflow("text_to_image")
    (loader,) = (i for i, node in prompt.items() if node["class_type"] == "MingUniVisionLoader")
    (draw,) = (i for i, node in prompt.items() if node["class_type"] == "MingGenerate")
    inputs = {"model": [loader, 0], "lora_name": sorted(ours)[0], "strength": 1.0}
    prompt["lora"] = {"class_type": "MingLoraLoader", "inputs": inputs}
    prompt[draw]["inputs"] |= {"model": ["lora", 0], "steps": 4}
    server.succeed(prompt)


def test_loras_of_the_folder_are_offered_and_one_of_another_model_is_an_error_on_the_node(server, workflow, loras):
    offered = server.get("/object_info/MingLoraLoader")["MingLoraLoader"]["input"]["required"]["lora_name"][0]
    assert set(loras) <= set(offered)
    other = {f"lora_unet_down_blocks_0.lora_{part}.weight": torch.zeros(4, 4) for part in ("up", "down")}
    save_file(other, server.base / "models" / "loras" / "other.safetensors")
    prompt = workflow("text_to_image")
    (loader,) = (i for i, node in prompt.items() if node["class_type"] == "MingUniVisionLoader")
    (draw,) = (i for i, node in prompt.items() if node["class_type"] == "MingGenerate")
    inputs = {"model": [loader, 0], "lora_name": "other.safetensors", "strength": 1.0}
    prompt["lora"] = {"class_type": "MingLoraLoader", "inputs": inputs}
    prompt[draw]["inputs"]["model"] = ["lora", 0]
    with server.client() as client:
        end = client.follow(client.queue(prompt)).end
    assert end.kind == "execution_error" and end.data["node_id"] == "lora"
    assert "nothing in this LoRA fits this model" in end.data["exception_message"]
