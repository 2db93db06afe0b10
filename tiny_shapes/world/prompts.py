"""Prompts: the instructions of every task, in many wordings, and edits in words.

`TASK_INSTRUCTIONS` has the phrasings that the published model was trained on, word for word, and ours for the tasks
that it has no words for. Every task uses them beside free variants (order, spelling, politeness, references).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .captions import caption
from .descriptions import DEFAULT_SIZE, FREE_CELLS, join_words, name_of, with_article
from .edits import Edit
from .masking import wholly_visible
from .phrasing import pick, place_phrase, refer_to, vary_spelling, vary_typing
from .scenes import Scene, SceneObject

TASK_INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        # Published phrasings, word for word.
        "generate": "Please generate the corresponding image based on the description. {text}",
        "describe": "Please describe the picture in detail.",
        "identify region": "Given the edit instruction: {text}, please identify the editing region",
        "refine": "Refine the image for better clarity.",
        "edit": "{text}",
        # Ours: no wording is published for these.
        "super-resolution": "Please increase the resolution of the picture. {text}",
        "denoise": "Please remove the noise from the picture. {text}",
        "colorize": "Please colorize the picture based on the description. {text}",
    }
)

_MIDDLE_OF_SENTENCE = "{text},"  # no text, or a full stop at its end, would read badly here


def instruction(task: str, text: str = "") -> str:
    """The instruction of a task with the user's text in it, in the words of `TASK_INSTRUCTIONS`.

    Raises ValueError for an unknown task, and for an empty text in the middle of a sentence.
    """
    if task not in TASK_INSTRUCTIONS:
        raise ValueError(f"{task!r} is not a task: use one of {', '.join(TASK_INSTRUCTIONS)}")
    template, text = TASK_INSTRUCTIONS[task], text.strip()
    if _MIDDLE_OF_SENTENCE in template:
        text = text.rstrip(" .")
        if not text:
            raise ValueError(f'text is empty, and the task "{task}" needs it: write the edit that you mean')
    return template.replace("{text}", text).strip()


_GENERATE = (
    *("{text}", "{text}", "{text}", "{text}", "Draw {text}", "Draw {text}", "Please draw {text}", "Draw me {text}"),
    *("Generate an image of {text}", "Create a picture: {text}", "A picture of {text}", "Show me {text}"),
)
_DESCRIBE = (
    *("Describe the picture.", "What do you see?", "What is in the picture?", "Describe this image in detail."),
    *("What is this?", "Describe this image.", "Describe it."),
)
_REGION = ("Show the region to edit: {text}", "Mark the area that would change: {text}")
_REFINE = ("Refine the picture.", "Make the picture clearer.", "Please sharpen and clean up the image.")
_SUPER_RESOLUTION = ("Increase the resolution. {text}", "Make the picture sharp. {text}", "Upscale this image. {text}")
_DENOISE = ("Remove the noise. {text}", "Denoise the picture. {text}", "Clean the noisy image. {text}")
_COLORIZE = ("Colorize the picture: {text}", "Add the colors: {text}", "Give the gray picture its colors. {text}")

_VARIANTS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "generate": _GENERATE,
        "describe": _DESCRIBE,
        "identify region": _REGION,
        "refine": _REFINE,
        "super-resolution": _SUPER_RESOLUTION,
        "denoise": _DENOISE,
        "colorize": _COLORIZE,
    }
)


def prompt(rng: np.random.Generator, task: str, text: str = "") -> str:
    """A prompt for one of `TASK_INSTRUCTIONS`: its own wording about half the time, else a variant."""
    if task == "edit":
        return vary_typing(rng, f"please {text[0].lower()}{text[1:]}" if rng.random() < 0.15 else text)
    if rng.random() < 0.5:
        return instruction(task, vary_typing(rng, text))
    return vary_typing(rng, pick(rng, _VARIANTS[task]).replace("{text}", text).strip())


def edit_words(rng: np.random.Generator, scene: Scene, edit: Edit) -> str:
    """An edit in a sentence with a full stop: "Make the red circle blue."."""
    if edit.subject is None:  # a new background
        backgrounds = (
            "Change the background to {value}.",
            "Make the background {value}.",
            "Use {article} background instead.",
            "Turn the background {value}.",
        )
        text = pick(rng, backgrounds).format(value=edit.value, article=with_article(edit.value))
    elif edit.kind == "add":
        text = f"{pick(rng, ('Add', 'Add', 'Place', 'Put'))} {_added(rng, scene, edit.subject)}."
    else:
        forms = {
            "recolor": (
                "Make {it} {value}.",
                "Paint {it} {value}.",
                "Change the color of {it} to {value}.",
                "Turn {it} {value}.",
                "Recolor {it} to {value}.",
            ),
            "remove": ("Remove {it}.", "Delete {it}.", "Erase {it}.", "Take {it} away."),
            "move": ("Move {it} to the {value}.", "Put {it} at the {value}.", "Shift {it} to the {value}."),
        }
        it = refer_to(rng, scene, edit.subject)
        text = pick(rng, forms[edit.kind]).format(it=it, value=edit.value)
    return vary_spelling(rng, text)


_COMPLETE = (
    *("Complete the picture", "Extend the picture", "Continue the picture", "Fill in the gray part"),
    *("Fill the rest of the picture", "Outpaint this picture", "Uncrop the picture"),
)


def completion_words(rng: np.random.Generator, scene: Scene, part: np.ndarray, side: str) -> str:
    """What an image of which only `part` is there shall show: "Extend the picture to the left: a red circle at ...".

    All of the scene is named, or what cannot be seen wholly, or nothing if everything can.
    """
    asked = pick(rng, _COMPLETE)
    if side and rng.random() < 0.6:
        asked += f" {'to' if side in ('left', 'right') else 'at'} the {side}"
    missing = [obj for obj in scene.objects if not wholly_visible(obj, part)]
    if rng.random() < 0.4:
        return f"{asked}: {caption(rng, scene)}"
    if not missing:
        return f"{asked}."
    with_objects = [f"{with_article(name_of(obj))} {place_phrase(rng, obj.position)}" for obj in missing]
    return vary_spelling(rng, f"{asked}{pick(rng, (': ', ' with ', '. Add '))}{join_words(with_objects)}.")


def _added(rng: np.random.Generator, scene: Scene, obj: SceneObject) -> str:
    size = "" if obj.size == DEFAULT_SIZE and rng.random() < 0.3 else obj.size
    name = with_article(" ".join(filter(None, (size, obj.color, obj.shape))))
    taken = {other.position for other in scene.objects}
    if obj.position == next(cell for cell in FREE_CELLS if cell not in taken) and rng.random() < 0.6:
        return name
    return f"{name} {place_phrase(rng, obj.position)}"
