"""What people ask of the model, in many wordings: instructions of every task, captions, and edits put in words.

Notable:
- `TASK_INSTRUCTIONS` has the phrasings that the published model was taught, word for word, and ours for what it has no
  words for; every task uses them beside free variants (order, spelling, politeness, how a thing is referred to).
- `caption` only leaves out what `descriptions.parse_scene` fills in, so every caption means exactly one scene. `brief`
  leaves out almost everything, as people do at first: "a red circle and a star".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from .descriptions import (
    DEFAULT_BACKGROUND,
    DEFAULT_SIZE,
    FREE_CELLS,
    describe,
    join_words,
    parse_scene,
    with_article,
)
from .edits import Edit
from .scenes import COLORS, POSITIONS, SHAPES, SIZES, Scene, Thing
from .wording import SPELLINGS, pick, refer, spelled, typed

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

_MIDDLE_OF_SENTENCE = "{text},"  # where a full stop of the user's text would read badly


def instruction(task: str, text: str = "") -> str:
    """The instruction of a task with the user's text in it, as `TASK_INSTRUCTIONS` words it.

    Raises ValueError for an unknown task.
    """
    if task not in TASK_INSTRUCTIONS:
        raise ValueError(f"{task!r} is not a task; choose one of: {', '.join(TASK_INSTRUCTIONS)}")
    template, text = TASK_INSTRUCTIONS[task], text.strip()
    if _MIDDLE_OF_SENTENCE in template:
        text = text.rstrip(" .")
    return template.replace("{text}", text).strip()


# --- captions -------------------------------------------------------------------------------------------------------


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """A description of the scene in varied words; `parse_scene` gives the scene back, jitter aside."""
    if not scene.things or rng.random() < 0.4:
        return spelled(rng, describe(scene))
    things = [_mention(rng, scene, scene.things[index]) for index in rng.permutation(len(scene.things))]
    listed = join_words(things, pick(rng, (" and ", " and ", ", ", ", and ") if len(things) > 1 else (" and ",)))
    ground = f"{with_article(scene.background)} background"
    forms = [
        f"{listed} on {ground}",
        f"{listed} against {ground}",
        f"{listed}, {scene.background} background",
        f"{ground} with {listed}",
        f"On {ground}: {listed}",
        f"There is {listed}. The background is {scene.background}.",
        f"{listed}, on plain {scene.background}",
    ]
    if scene.background == DEFAULT_BACKGROUND:
        forms += [listed, listed]
    return spelled(rng, pick(rng, forms))


def brief(rng: np.random.Generator, scene: Scene) -> str:
    """Few words about things as they are in the scene; what they leave out is as `parse_scene` fills it in."""
    article = (lambda name: name) if rng.random() < 0.3 else with_article
    things = []
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        size = thing.size if rng.random() < 0.25 else ""
        color = thing.color if rng.random() < 0.92 else ""
        place = f" {_place(rng, thing.position)}" if rng.random() < 0.15 else ""
        things.append(article(" ".join(filter(None, (size, color, thing.shape)))) + place)
    text = join_words(things, pick(rng, (" and ", " and ", ", ")))
    if rng.random() < 0.35:
        text += pick(rng, (f" on {with_article(scene.background)} background", f" on {scene.background}"))
    return spelled(rng, text)


def _mention(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """ "a large red circle at the top left", in variants; a size or place that goes without saying may be left out."""
    size = "" if thing.size == DEFAULT_SIZE and rng.random() < 0.4 else thing.size
    name = with_article(" ".join(filter(None, (size, thing.color, thing.shape))))
    if len(scene.things) == 1 and thing.position == "centre" and rng.random() < 0.4:
        return name
    if rng.random() < 0.2:
        return f"at the {thing.position} {name}"
    return f"{name} {_place(rng, thing.position)}"


def _place(rng: np.random.Generator, position: str) -> str:
    forms = [f"at the {position}", f"at the {position}"]
    if " " in position:
        forms += [f"in the {position}", f"in the {position} corner", f"at the {position.replace(' ', '-')}"]
    elif position in ("left", "right"):
        forms += [f"on the {position}", f"on the {position} side"]
    elif position == "centre":
        forms += ["in the centre"]
    return pick(rng, forms)


def _one_of(words: Iterable[str]) -> str:
    spellings = (spelling for word in words for spelling in SPELLINGS.get(word, (word,)))
    return "|".join(spelling.replace(" ", "[ -]") for spelling in spellings)


# What `_mention` and `_added` write. Longest place first, for "top left" begins as "top" does.
_PLACES = _one_of(sorted(POSITIONS, key=len, reverse=True))
_MENTIONED = re.compile(
    rf"(?:at the (?:{_PLACES}) )?\b(?P<known>the )?(?:an? )?(?:(?:{_one_of(SIZES)}) )?(?:{_one_of(COLORS)}) "
    rf"(?:{_one_of(SHAPES)})\b"
    rf"(?: (?:at|in|on) the (?:{_PLACES})(?: corner| side)?)?",
    re.IGNORECASE,
)


def mentions(text: str, scene: Scene) -> Iterator[tuple[int, Thing]]:
    """The things of the scene that a prompt with a caption names, each with the place where its words end."""
    for found in _MENTIONED.finditer(text):
        if found["known"]:  # it is spoken of, not told
            continue
        (told,) = parse_scene(found.group()).things
        anywhere = not re.search(_PLACES, found.group(), re.IGNORECASE)
        fitting = [
            thing
            for thing in scene.things
            if thing.content == (replace(told, position=thing.position) if anywhere else told).content
        ]
        if len(fitting) == 1:  # else two look alike, and the words do not say which comes where
            yield found.end(), fitting[0]


# --- prompts --------------------------------------------------------------------------------------------------------

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
    """An instruction for one of `TASK_INSTRUCTIONS`: its own wording about half the time, else a variant."""
    if task == "edit":
        return typed(rng, f"please {text[0].lower()}{text[1:]}" if rng.random() < 0.15 else text)
    if rng.random() < 0.5:
        return instruction(task, typed(rng, text))
    return typed(rng, pick(rng, _VARIANTS[task]).replace("{text}", text).strip())


def edit_words(rng: np.random.Generator, scene: Scene, edit: Edit) -> str:
    """What to ask for, in a sentence with a full stop: "Make the red circle blue."."""
    if edit.kind == "background":
        forms = (
            "Change the background to {value}.",
            "Make the background {value}.",
            "Use {article} background instead.",
            "Turn the background {value}.",
        )
        text = pick(rng, forms).format(value=edit.value, article=with_article(edit.value))
    elif edit.kind == "add":
        text = f"{pick(rng, ('Add', 'Add', 'Place', 'Put'))} {_added(rng, scene, edit.thing)}."
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
        it = refer(rng, scene, edit.thing)
        text = pick(rng, forms[edit.kind]).format(it=it, value=edit.value)
    return spelled(rng, text)


def _added(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    size = "" if thing.size == DEFAULT_SIZE and rng.random() < 0.3 else thing.size
    name = with_article(" ".join(filter(None, (size, thing.color, thing.shape))))
    taken = {other.position for other in scene.things}
    if thing.position == next(cell for cell in FREE_CELLS if cell not in taken) and rng.random() < 0.6:
        return name
    return f"{name} {_place(rng, thing.position)}"
