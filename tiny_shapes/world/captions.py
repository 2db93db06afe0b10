"""Captions: descriptions of a scene in varied words, complete and terse, and which objects a caption names.

`caption` leaves out only what `descriptions.parse_scene` fills in, so every caption means exactly one scene.
`terse_caption` leaves out almost everything, as people do at first: "a red circle and a star".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from .descriptions import DEFAULT_BACKGROUND, DEFAULT_SIZE, describe, join_words, parse_scene, with_article
from .phrasing import SPELLINGS, pick, place_phrase, vary_spelling
from .scenes import COLORS, POSITIONS, SHAPES, SIZES, Scene, SceneObject


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """A description of the scene in varied words, from which `parse_scene` gives the scene back, without jitter."""
    if not scene.objects or rng.random() < 0.4:
        return vary_spelling(rng, describe(scene))
    objects = [_mention(rng, scene, scene.objects[index]) for index in rng.permutation(len(scene.objects))]
    listed = join_words(objects, pick(rng, (" and ", " and ", ", ", ", and ") if len(objects) > 1 else (" and ",)))
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
    return vary_spelling(rng, pick(rng, forms))


def terse_caption(rng: np.random.Generator, scene: Scene) -> str:
    """A short description of the objects in the scene; `parse_scene` fills in what it leaves out."""
    article = (lambda name: name) if rng.random() < 0.3 else with_article
    objects = []
    for index in rng.permutation(len(scene.objects)):
        obj = scene.objects[index]
        size = obj.size if rng.random() < 0.25 else ""
        color = obj.color if rng.random() < 0.92 else ""
        place = f" {place_phrase(rng, obj.position)}" if rng.random() < 0.15 else ""
        objects.append(article(" ".join(filter(None, (size, color, obj.shape)))) + place)
    text = join_words(objects, pick(rng, (" and ", " and ", ", ")))
    if rng.random() < 0.35:
        text += pick(rng, (f" on {with_article(scene.background)} background", f" on {scene.background}"))
    return vary_spelling(rng, text)


def _mention(rng: np.random.Generator, scene: Scene, obj: SceneObject) -> str:
    """An object in words: "a large red circle at the top left". A default size or place may be left out."""
    size = "" if obj.size == DEFAULT_SIZE and rng.random() < 0.4 else obj.size
    name = with_article(" ".join(filter(None, (size, obj.color, obj.shape))))
    if len(scene.objects) == 1 and obj.position == "centre" and rng.random() < 0.4:
        return name
    if rng.random() < 0.2:
        return f"at the {obj.position} {name}"
    return f"{name} {place_phrase(rng, obj.position)}"


def _one_of(words: Iterable[str]) -> str:
    spellings = (spelling for word in words for spelling in SPELLINGS.get(word, (word,)))
    return "|".join(spelling.replace(" ", "[ -]") for spelling in spellings)


# Matches what `_mention` writes. The longest places come first, because "top left" begins with "top".
_PLACES = _one_of(sorted(POSITIONS, key=len, reverse=True))
_MENTIONED = re.compile(
    rf"(?:at the (?:{_PLACES}) )?\b(?P<known>the )?(?:an? )?(?:(?:{_one_of(SIZES)}) )?(?:{_one_of(COLORS)}) "
    rf"(?:{_one_of(SHAPES)})\b"
    rf"(?: (?:at|in|on) the (?:{_PLACES})(?: corner| side)?)?",
    re.IGNORECASE,
)


def mentions(text: str, scene: Scene) -> Iterator[tuple[int, SceneObject]]:
    """The objects of the scene that a prompt with a caption names, each with the index where its words end."""
    for found in _MENTIONED.finditer(text):
        if found["known"]:  # refers to an object that is there already
            continue
        (named,) = parse_scene(found.group()).objects
        anywhere = not re.search(_PLACES, found.group(), re.IGNORECASE)
        fitting = [
            obj
            for obj in scene.objects
            if obj.content == (replace(named, position=obj.position) if anywhere else named).content
        ]
        if len(fitting) == 1:  # otherwise two look alike, and the words do not say which comes where
            yield found.end(), fitting[0]
