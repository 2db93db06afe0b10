"""The small change of language: spelling, typing habits, and words that single a thing out.

A thing is referred to by any set of its attributes that fits no other thing of its scene, never by ambiguous words;
"it" is the only one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import TypeVar

import numpy as np

from .scenes import Scene, Thing

_Option = TypeVar("_Option")

SPELLINGS = {
    **{"gray": ("gray", "gray", "grey"), "centre": ("centre", "centre", "center", "middle")},
    **{"color": ("color", "color", "colour"), "colors": ("colors", "colors", "colours")},
}


def pick(rng: np.random.Generator, options: Sequence[_Option]) -> _Option:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def spelled(rng: np.random.Generator, text: str) -> str:
    """The text with some words in another usual spelling."""
    return re.sub(r"\b(gray|colors?|centre)\b", lambda match: pick(rng, SPELLINGS[match.group()]), text)


def typed(rng: np.random.Generator, text: str) -> str:
    """As people type: mostly a capital first, sometimes all as it comes or without the full stop."""
    if not text:
        return text
    if rng.random() < 0.15:
        return text[0].lower() + text[1:].rstrip(".")
    return text[0].upper() + text[1:] if rng.random() < 0.8 else text


_ATTRIBUTES = ("size", "color", "shape", "position")
_WAYS = tuple(way for count in (1, 2, 3) for way in combinations(_ATTRIBUTES, count))


def references(scene: Scene, thing: Thing, hide: Collection[str] = ()) -> list[tuple[str, ...]]:
    """Which sets of attributes single a thing out in its scene; fewest attributes first, empty when there is none.

    `hide`: attributes not to be told, for an answer must not stand in its question.
    """
    return [
        way
        for way in _WAYS
        if not set(way) & set(hide)
        and sum(all(getattr(other, name) == getattr(thing, name) for name in way) for other in scene.things) == 1
    ]


def refer(rng: np.random.Generator, scene: Scene, thing: Thing, hide: Collection[str] = ()) -> str | None:
    """ "the red circle" or other words that mean this thing alone; None when nothing singles it out."""
    if len(scene.things) == 1 and rng.random() < 0.25:
        return "it"
    ways = references(scene, thing, hide)
    if not ways:
        return None
    # People mostly say colour and shape; a size alone ("the large object") is rare.
    weights = np.array([1.0 + 3.0 * ("shape" in way) + 3.0 * ("color" in way and "shape" in way) for way in ways])
    way = ways[int(rng.choice(len(ways), p=weights / weights.sum()))]
    noun = thing.shape if "shape" in way else pick(rng, ("object", "thing"))
    words = [getattr(thing, name) for name in ("size", "color") if name in way]
    place = f" at the {thing.position}" if "position" in way else ""
    return f"the {' '.join([*words, noun])}{place}"
