"""Captions: descriptions of a scene in varied words, complete and terse, and which objects a caption names.

`caption` leaves out only what `descriptions.parse_scene` fills in, so every caption means exactly one scene.
`terse_caption` leaves out almost everything, as people do at first: "a red circle and a star".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from .descriptions import (
    DEFAULT_BACKGROUND,
    DEFAULT_SIZE,
    NamedObject,
    describe,
    join_words,
    named_objects,
    with_article,
)
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


def terse_caption(rng: np.random.Generator, scene: Scene, colored: float = 0.92, placed: float = 0.15) -> str:
    """A short description of the objects in the scene; `parse_scene` fills in what it leaves out.

    colored, placed  shares of the objects whose color is named, and of those whose place is
    """
    article = (lambda name: name) if rng.random() < 0.3 else with_article
    objects = []
    for index in rng.permutation(len(scene.objects)):
        obj = scene.objects[index]
        size = obj.size if rng.random() < 0.25 else ""
        color = obj.color if rng.random() < colored else ""
        place = f" {place_phrase(rng, obj.position)}" if rng.random() < placed else ""
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


# Matches an object as captions name it. The longest places come first, because "top left" begins with "top".
_PLACES = _one_of(sorted(POSITIONS, key=len, reverse=True))
_MENTIONED = re.compile(
    rf"(?:at the (?:{_PLACES}) )?\b(?P<known>the )?(?:an? )?(?:(?:{_one_of(SIZES)}) )?(?:(?:{_one_of(COLORS)}) )?"
    rf"(?:{_one_of(SHAPES)})\b"
    rf"(?: (?:at|in|on) the (?:{_PLACES})(?: corner| side)?)?",
    re.IGNORECASE,
)


def mentions(text: str, scene: Scene) -> Iterator[tuple[int, SceneObject]]:
    """The objects of the scene that a prompt with a caption names, each with the index where its words end."""
    named: dict[int, list[SceneObject]] = {}
    for found in _MENTIONED.finditer(text):
        if not found["known"]:  # otherwise it refers to an object that is there already
            (words,) = named_objects(found.group())
            named[found.end()] = [obj for obj in scene.objects if _fits(words, obj)]
    for end, fitting in named.items():
        # "a red star and a star": the words with a color say which one is meant by those without
        others = [objects[0] for other, objects in named.items() if other != end and len(objects) == 1]
        left = [obj for obj in fitting if obj not in others]
        if len(left) == 1:  # otherwise two look alike, and the words do not say which comes where
            yield end, left[0]


def _fits(words: NamedObject, obj: SceneObject) -> bool:
    """Whether the words may mean the object. A size that they do not name is the default one."""
    named = (words.shape, words.color, words.size or DEFAULT_SIZE, words.position)
    return all(word in ("", value) for word, value in zip(named, obj.content, strict=True))
