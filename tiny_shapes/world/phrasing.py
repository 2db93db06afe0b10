"""Variation of wording: spelling, typing habits, places, and references to an object.

An object is referred to by a set of its attributes that fits no other object of its scene, or by "it" if it is the only
one; never by ambiguous words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

from .scenes import Scene, SceneObject

_Option = TypeVar("_Option")

SPELLINGS = {
    **{"gray": ("gray", "gray", "grey"), "centre": ("centre", "centre", "center", "middle")},
    **{"color": ("color", "color", "colour"), "colors": ("colors", "colors", "colours")},
}


def pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    """A random option, all equally likely."""
    return options[int(rng.integers(len(options)))]


def vary_spelling(rng: np.random.Generator, text: str) -> str:
    """The text with some words in another common spelling."""
    return re.sub(r"\b(gray|colors?|centre)\b", lambda match: pick(rng, SPELLINGS[match.group()]), text)


def vary_typing(rng: np.random.Generator, text: str) -> str:
    """The text as people type it: mostly with a capital first, sometimes in lower case and without the full stop."""
    if not text:
        return text
    if rng.random() < 0.15:
        return text[0].lower() + text[1:].rstrip(".")
    return text[0].upper() + text[1:] if rng.random() < 0.8 else text


_ATTRIBUTES = ("size", "color", "shape", "position")
_ATTRIBUTE_SETS = tuple(names for count in (1, 2, 3) for names in combinations(_ATTRIBUTES, count))


def referring_attributes(scene: Scene, obj: SceneObject, hide: Collection[str] = ()) -> list[tuple[str, ...]]:
    """The sets of attributes that identify an object in its scene, smallest first; empty if there is none.

    hide: attributes that must not be used, because they are the answer to the question.
    """
    return [
        names
        for names in _ATTRIBUTE_SETS
        if not set(names) & set(hide)
        and sum(all(getattr(other, name) == getattr(obj, name) for name in names) for other in scene.objects) == 1
    ]


def refer_to(rng: np.random.Generator, scene: Scene, obj: SceneObject, hide: Collection[str] = ()) -> str | None:
    """Words that mean this object alone, such as "the red circle"; None if nothing identifies it."""
    if len(scene.objects) == 1 and rng.random() < 0.25:
        return "it"
    options = referring_attributes(scene, obj, hide)
    if not options:
        return None
    # People mostly say color and shape; a size alone ("the large object") is rare.
    weights = np.array([1.0 + 3.0 * ("shape" in n) + 3.0 * ("color" in n and "shape" in n) for n in options])
    names = options[int(rng.choice(len(options), p=weights / weights.sum()))]
    noun = obj.shape if "shape" in names else pick(rng, ("object", "thing"))
    words = [getattr(obj, name) for name in ("size", "color") if name in names]
    place = f" at the {obj.position}" if "position" in names else ""
    return f"the {' '.join([*words, noun])}{place}"


def place_phrase(rng: np.random.Generator, position: str) -> str:
    """A position in words: "at the top left", "in the top left corner", "at the top-left"."""
    forms = [f"at the {position}", f"at the {position}"]
    if " " in position:
        forms += [f"in the {position}", f"in the {position} corner", f"at the {position.replace(' ', '-')}"]
    elif position in ("left", "right"):
        forms += [f"on the {position}", f"on the {position} side"]
    elif position == "centre":
        forms += ["in the centre"]
    return pick(rng, forms)
