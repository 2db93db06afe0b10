"""The prompts of the soak: shipped workflows with random words, and others that load or save a lot."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from .server import read_workflow

COLORS = ("red", "blue", "green", "yellow", "purple", "pink")
BACKGROUNDS = ("white", "black", "navy", "mint")
SHAPES = ("circle", "square", "triangle", "star")
PLACES = ("left", "right", "top", "bottom")
BUILT_IN = "tiny-shapes (built in)"
SMALL = "small"  # a model with random weights that takes a tenth of the time, so that there can be many prompts
KEPT = 3  # runs of save_and_continue whose files are loaded again
# Kinds of prompts, and how often each comes: shipped workflows, and two that load what `kept` saved.
LOAD_CONVERSATION, LOAD_FEATURES = "load a conversation", "load features"
KINDS = {
    "text_to_image": 3,
    "describe": 3,
    "reconstruct": 2,
    "text_chat": 2,
    "draw_then_ask": 1,
    "segment_then_edit": 1,
    "multi_round_edit": 1,
    "branch_edits": 1,
    "edit_inside_mask": 1,
    "region_then_edit_inside": 1,
    "compare_two_pictures": 1,
    "save_and_continue": 2,
    LOAD_CONVERSATION: 1,
    LOAD_FEATURES: 1,
}


def thing(rng: random.Random) -> str:
    return f"{rng.choice(('small', 'large'))} {rng.choice(COLORS)} {rng.choice(SHAPES)}"


def description(rng: random.Random) -> str:
    return f"a {thing(rng)} at the {rng.choice(PLACES)} on a {rng.choice(BACKGROUNDS)} background"


def edit(rng: random.Random) -> str:
    verbs = (
        f"Change the background to {rng.choice(BACKGROUNDS)}.",
        f"Remove the {rng.choice(SHAPES)}.",
        f"Add a {thing(rng)}.",
    )
    return rng.choice(verbs)


def question(rng: random.Random) -> str:
    return rng.choice(("What color is the circle?", "How many shapes are there?", "Where is the star?"))


def any_prompt(rng: random.Random) -> dict:
    """A prompt of a random kind: one of four for the built-in model, the others for the small one."""
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    graph = prompt(kind, rng)
    if kind not in (LOAD_CONVERSATION, LOAD_FEATURES) and rng.random() < 0.75:  # these are of the built-in model
        for node in graph.values():
            if "model_name" in node["inputs"]:
                node["inputs"]["model_name"] = SMALL
    return graph


def one_of_each() -> list[dict]:
    """Prompts that use every kind, each model, and each precision that the soak uses."""
    graphs = [prompt(kind, random.Random(number)) for number, kind in enumerate(KINDS)]
    for name in (BUILT_IN, SMALL):
        for precision in ("auto", "int8", "int8"):
            loader = {"1.model_name": name, "1.precision": precision, "3.steps": 1}
            graphs.append(read_workflow("text_to_image", loader))
    return graphs


def is_of_small_model(graph: dict) -> bool:
    return any(node["inputs"].get("model_name") == SMALL for node in graph.values())


def prompt(kind: str, rng: random.Random) -> dict:
    """A prompt of one kind with random words and values, of which few differ, so that caches are used too."""
    graph = loading(kind, rng) if kind in (LOAD_CONVERSATION, LOAD_FEATURES) else read_workflow(kind)
    for node in graph.values():
        change(node, rng)
    return graph


def change(node: dict, rng: random.Random) -> None:
    inputs, words = node["inputs"], {"generate": description, "edit": edit, "identify region": edit}
    values: dict[str, Callable[[], Any]] = {
        "seed": lambda: rng.randrange(8),
        "steps": lambda: rng.randint(1, 3),
        "max_new_tokens": lambda: rng.choice((24, 48)),
        "scene": lambda: description(rng),
        "instruction": lambda: edit(rng),
        "prompt": lambda: (question if node["class_type"] == "MingUnderstand" else description)(rng),
        "text": lambda: words[inputs["task"]](rng) if inputs.get("task") in words else inputs["text"],
    }
    for name in [name for name in values if name in inputs]:  # in a fixed order
        if not isinstance(inputs[name], list):  # a list is a link
            inputs[name] = values[name]()
    if node["class_type"] == "MingUniVisionLoader" and rng.random() < 0.05:
        inputs["precision"] = "int8"
    if node["class_type"] == "MingGenerate" and rng.random() < 0.1:
        inputs["batch_size"] = 2


def loading(kind: str, rng: random.Random) -> dict:
    """Goes on with a conversation that was saved, or shows features that were."""
    number = rng.randint(1, KEPT)
    graph = read_workflow("text_to_image")
    if kind == LOAD_FEATURES:
        file = f"ming/kept_picture_{number:05}_.safetensors [output]"
        graph["3"] = {"class_type": "MingLoadFeatures", "inputs": {"file": file}}
        return graph
    file = f"ming/kept_{number:05}_.safetensors [output]"
    graph["6"] = {"class_type": "MingLoadConversation", "inputs": {"model": ["1", 0], "file": file}}
    edited = {name: value for name, value in graph["3"]["inputs"].items() if name != "prompt"}
    edited |= {"instruction": "Make it blue.", "conversation": ["6", 0]}
    graph["3"] = {"class_type": "MingEdit", "inputs": edited}
    again = {"conversation": ["3", 1], "filename_prefix": "continued", "overwrite": False}
    graph["7"] = {"class_type": "MingSaveConversation", "inputs": again}
    return graph


def kept(number: int) -> dict:
    """The prompt that saves what `loading` loads."""
    changes = {"8.filename_prefix": "kept", "10.filename_prefix": "kept_second", "11.filename_prefix": "kept_picture"}
    return read_workflow("save_and_continue", changes | {"2.seed": number, "9.steps": 2})


def many_saves(number: int) -> dict:
    """Saves one large file of features and a small conversation, again and again."""
    graph = read_workflow("describe", {"2.seed": number, "2.size": 128, "6.max_new_tokens": 4})
    graph["8"] = {"class_type": "RepeatImageBatch", "inputs": {"image": ["2", 0], "amount": 128}}
    graph["9"] = {"class_type": "MingTokEncode", "inputs": graph["3"]["inputs"] | {"image": ["8", 0]}}
    graph["10"] = {"class_type": "MingTokSemanticFeatures", "inputs": {"mingtok": ["1", 1], "latent": ["9", 0]}}
    for i in range(12):
        small = {"conversation": ["6", 1], "filename_prefix": f"killed_talk_{i}", "overwrite": False}
        large = {"features": ["10", 0], "filename_prefix": f"killed_{i}"}
        graph[f"small {i}"] = {"class_type": "MingSaveConversation", "inputs": small}
        graph[f"large {i}"] = {"class_type": "MingSaveFeatures", "inputs": large}
    return graph
