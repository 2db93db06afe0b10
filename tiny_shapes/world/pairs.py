"""Questions about two images that are shown in one message: which of them has a thing, what differs, and what is to be
seen in one of them.

Answers are always worded alike: "the first", "the second", "both", "neither"; "the color", "the place",
"the background", "nothing"; of one image, those of `questions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .descriptions import with_article
from .edits import Edit
from .phrasing import pick, vary_spelling, vary_typing
from .questions import QUESTION_KINDS, Question, question
from .scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, Scene

PAIR_KINDS = ("which", "difference", "one")

WHICH: Mapping[tuple[bool, bool], str] = MappingProxyType(
    {(True, False): "the first", (False, True): "the second", (True, True): "both", (False, False): "neither"}
)
DIFFERENCES: Mapping[str, str] = MappingProxyType(
    {"recolor": "the color", "move": "the place", "background": "the background", "": "nothing"}
)

_WHICH = (
    *("Which of the two has {it}?", "Which picture has {it}?", "Which one has {it}?", "In which picture is {it}?"),
    *("Which of the two pictures shows {it}?", "Which image has {it}, the first or the second?"),
)
_DIFFERENCE = (
    *("What differs?", "What is the difference?", "What is different?", "What has changed?"),
    "What is the difference between the two pictures?",
)
_ATTRIBUTES = (("shape",), ("shape",), ("color", "shape"), ("color", "shape"), ("color",), ("shape", "position"))


def ask_which(rng: np.random.Generator, first: Scene, second: Scene) -> Question:
    """A question for which of two scenes has a thing. Its subject is that thing, if there is just one."""
    subject = None
    if rng.random() < 0.1:
        ground = pick(rng, (first.background, second.background, pick(rng, tuple(BACKGROUNDS))))
        it, there = f"{with_article(ground)} background", [scene.background == ground for scene in (first, second)]
    else:
        names = pick(rng, _ATTRIBUTES)
        asked = {"shape": pick(rng, SHAPES), "color": pick(rng, tuple(COLORS)), "position": pick(rng, tuple(POSITIONS))}
        if rng.random() < 0.85:
            near = pick(rng, pick(rng, (first, second)).objects)
            asked = {name: getattr(near, name) for name in asked}
        found = [
            [obj for obj in scene.objects if all(getattr(obj, name) == asked[name] for name in names)]
            for scene in (first, second)
        ]
        there = [bool(objects) for objects in found]
        subject = (found[0] + found[1])[0] if len(found[0] + found[1]) == 1 else None
        noun = " ".join([asked["color"]] * ("color" in names) + [asked["shape"] if "shape" in names else "object"])
        it = with_article(noun) + (f" at the {asked['position']}" if "position" in names else "")
    text = vary_typing(rng, vary_spelling(rng, pick(rng, _WHICH).format(it=it)))
    return Question(text, WHICH[there[0], there[1]], subject)


def ask_difference(rng: np.random.Generator, edit: Edit | None) -> Question:
    """A question for what the edit (None: none) from the first scene to the second has changed.

    edit: a recolor, a move or a new background. Its subject is that of the edit.
    """
    text = vary_typing(rng, pick(rng, _DIFFERENCE))
    return Question(text, DIFFERENCES[edit.kind if edit else ""], edit.subject if edit else None)


def ask_one(rng: np.random.Generator, first: Scene, second: Scene) -> Question | None:
    """A question about one of two scenes: "What color is the star in the second picture?". None if it allows none."""
    number = int(rng.integers(2))
    asked = question(rng, (first, second)[number], pick(rng, QUESTION_KINDS))
    if asked is None:
        return None
    of = f"the {('first', 'second')[number]} {pick(rng, ('picture', 'image'))}"
    text = asked.text.rstrip("?.")
    # some questions end with a place, which would seem to be one in the second image
    forms = (f"In {of}: {text}?", f"In {of}: {text}?", f"{text}, in {of}?")
    return asked._replace(text=vary_typing(rng, pick(rng, forms)))
