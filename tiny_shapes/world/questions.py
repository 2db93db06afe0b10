"""Questions about a scene, and small talk about the world that needs no image, each with its answer.

Questions vary in kind and wording. Answers are a word or two and always worded alike, so that they can be compared
exactly: "red", "star", "large", "at the top left", "two", "yes", "white", and "nothing" for an empty place.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from .descriptions import join_words, with_article
from .phrasing import pick, refer_to, vary_spelling, vary_typing
from .scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene, SceneObject

QUESTION_KINDS = ("color", "shape", "size", "where", "count", "exists", "background")

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Question(NamedTuple):
    """A question and its answer. `subject`: the one object of the scene that it is about; None if there is not one."""

    text: str
    answer: str
    subject: SceneObject | None = None


def question(rng: np.random.Generator, scene: Scene, kind: str) -> Question | None:
    """A question of one of `QUESTION_KINDS` about the scene; None if the scene does not allow it."""
    if kind not in QUESTION_KINDS:
        raise ValueError(f"{kind!r} is not a kind of question: use one of {', '.join(QUESTION_KINDS)}")
    asked = _ASKERS[kind](rng, scene)
    return asked and asked._replace(text=vary_typing(rng, vary_spelling(rng, asked.text)))


def _ask_background(rng: np.random.Generator, scene: Scene) -> Question:
    forms = ("What color is the background?", "What is the background color?", "Which color does the background have?")
    return Question(pick(rng, forms), scene.background)


def _ask_count(rng: np.random.Generator, scene: Scene) -> Question:
    """A question for the number of objects, or of those of one color or shape, which is mostly one of the scene's."""
    what, number = pick(rng, ("objects", "things")), len(scene.objects)
    attribute = pick(rng, ("", "color", "shape"))
    if attribute:
        words = SHAPES if attribute == "shape" else tuple(COLORS)
        there = [getattr(obj, attribute) for obj in scene.objects]
        word = pick(rng, there) if there and rng.random() < 0.6 else pick(rng, words)
        number = there.count(word)
        what = f"{word} {what}" if attribute == "color" else f"{word}es" if word == "cross" else f"{word}s"
    forms = ("How many {what} are there?", "How many {what} do you see?", "Count the {what}.")
    return Question(pick(rng, forms).format(what=what), _NUMBERS[number])


def _ask_exists(rng: np.random.Generator, scene: Scene) -> Question:
    """A yes-or-no question, both about equally often; for a no mostly just one attribute is wrong."""
    names = pick(rng, (("color", "shape"), ("color", "shape"), ("shape",), ("color",), ("color", "shape", "position")))
    asked = {"shape": pick(rng, SHAPES), "color": pick(rng, tuple(COLORS)), "position": pick(rng, tuple(POSITIONS))}
    if scene.objects and rng.random() < 0.85:
        near = pick(rng, scene.objects)
        wrong = pick(rng, names) if rng.random() < 0.55 else None
        asked = {name: asked[name] if name == wrong else getattr(near, name) for name in asked}
    there = [obj for obj in scene.objects if all(getattr(obj, name) == asked[name] for name in names)]
    noun = " ".join([asked["color"]] * ("color" in names) + [asked["shape"] if "shape" in names else "object"])
    place = f" at the {asked['position']}" if "position" in names else ""
    form = pick(rng, ("Is there {it}?", "Do you see {it}?", "Is {it} in the picture?"))
    text = form.format(it=with_article(noun) + place)
    return Question(text, "yes" if there else "no", there[0] if len(there) == 1 else None)


def _ask_attribute(rng: np.random.Generator, scene: Scene, hide: str, forms: Sequence[str]) -> Question | None:
    """A question for the attribute `hide` of an object that can be identified without it."""
    for index in rng.permutation(len(scene.objects)):
        obj = scene.objects[index]
        it = refer_to(rng, scene, obj, hide=(hide,))
        if it:
            return Question(pick(rng, forms).format(it=it), getattr(obj, hide), obj)
    return None


def _ask_color(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_attribute(rng, scene, "color", ("What color is {it}?", "Which color does {it} have?"))


def _ask_size(rng: np.random.Generator, scene: Scene) -> Question | None:
    return _ask_attribute(rng, scene, "size", ("Is {it} small or large?", "What size is {it}?", "How big is {it}?"))


def _ask_where(rng: np.random.Generator, scene: Scene) -> Question | None:
    asked = _ask_attribute(
        rng, scene, "position", ("Where is {it}?", "Where do you see {it}?", "At which place is {it}?")
    )
    return asked and asked._replace(answer=f"at the {asked.answer}")


def _ask_shape(rng: np.random.Generator, scene: Scene) -> Question | None:
    """A question for the shape of an object, or for what is in a cell, which may be empty."""
    if rng.random() < 0.4:
        there = {obj.position: obj for obj in scene.objects}
        cell = pick(rng, tuple(there)) if there and rng.random() < 0.8 else pick(rng, tuple(POSITIONS))
        obj = there.get(cell)
        form = pick(rng, ("What shape is at the {cell}?", "What is at the {cell}?", "Which shape is at the {cell}?"))
        return Question(form.format(cell=cell), obj.shape if obj else "nothing", obj)
    return _ask_attribute(rng, scene, "shape", ("What shape is {it}?", "Which shape is {it}?", "What is {it}?"))


_ASKERS = MappingProxyType(
    {
        "color": _ask_color,
        "shape": _ask_shape,
        "size": _ask_size,
        "where": _ask_where,
        "count": _ask_count,
        "exists": _ask_exists,
        "background": _ask_background,
    }
)


_KNOWN = {"shapes": SHAPES, "colors": tuple(COLORS), "backgrounds": tuple(BACKGROUNDS)} | {
    "sizes": tuple(SIZES),
    "positions": tuple(POSITIONS),
}
_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hi!", "Good morning!", "Hello there."), "Hello! I see, draw and edit colored shapes."),
    (("Who are you?", "What are you?", "What is your name?"), "I am a tiny model of a world of shapes."),
    (
        ("What can you do?", "How can you help me?", "What are you good at?"),
        "I can describe pictures, answer questions, draw, and edit, round after round.",
    ),
    (("Thank you!", "Thanks!", "Thanks a lot."), "You are welcome!"),
    (("How many things fit in a cell?", "How many objects can be in one cell?"), "one"),
    (("How many objects does a picture have?", "How many things are in your pictures?"), "one to three"),
    (("Which shape is round?", "What shape has no corners?"), "circle"),
    (("Which shape has three corners?", "What shape has three sides?"), "triangle"),
    (("Which shape has five points?", "What shape has five tips?"), "star"),
    (("Which shape has four equal arms?", "What shape looks like a plus sign?"), "cross"),
)


def small_talk(rng: np.random.Generator) -> tuple[str, str]:
    """A question that needs no image, such as "Which shapes do you know?", and its answer."""
    choice = rng.random()
    if choice < 0.35:
        kind = pick(rng, tuple(_KNOWN))
        lists = ("Which {kind} do you know?", "What {kind} are there?", "List the {kind} that you know.")
        asked, answer = pick(rng, lists).format(kind=kind), join_words(_KNOWN[kind])
    elif choice < 0.45:
        kind = pick(rng, tuple(_KNOWN))
        asked, answer = f"How many {kind} do you know?", _NUMBERS[len(_KNOWN[kind])]
    elif choice < 0.6:
        word, kind = pick(rng, [*_KNOWN_WORDS, *_UNKNOWN_WORDS])
        form = pick(rng, ("Do you know the {kind} {word}?", "Is {word} a {kind} you know?"))
        asked = form.format(kind=kind, word=word)
        answer = "yes" if (word, kind) in _KNOWN_WORDS else "no"
    else:
        forms, answer = pick(rng, _TALK)
        asked = pick(rng, forms)
    return vary_typing(rng, vary_spelling(rng, asked)), answer


_KNOWN_WORDS = tuple((shape, "shape") for shape in SHAPES) + tuple((color, "color") for color in COLORS)
_UNKNOWN_WORDS = tuple(
    (word, "shape") for word in ("hexagon", "heart", "moon", "oval", "arrow", "ring", "cube")
) + tuple((word, "color") for word in ("brown", "silver", "gold", "olive", "maroon"))
