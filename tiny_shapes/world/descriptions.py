"""Scenes as text and back: the canonical description, and a parser of what people type.

`describe` and `parse_scene` are inverse up to jitter. `parse_scene` accepts any order, commas, synonyms and "the
background is white", fills in what is missing, and says precisely which word it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .scenes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene, SceneObject

# The defaults for what a description leaves out. A lone object without a place is at the centre.
DEFAULT_SIZE = "large"
DEFAULT_BACKGROUND = "white"
FREE_CELLS = ("centre", "left", "right", "top", "bottom", *(cell for cell in POSITIONS if " " in cell))

_SYNONYMS = {
    **{"grey": "gray", "cream": "beige", "violet": "purple", "magenta": "pink", "turquoise": "cyan", "aqua": "cyan"},
    **{"center": "centre", "middle": "centre", "upper": "top", "lower": "bottom"},
    **{"big": "large", "huge": "large", "little": "small", "tiny": "small"},
    **{"disc": "circle", "disk": "circle", "dot": "circle", "ball": "circle", "box": "square", "rhombus": "diamond"},
    **{"plus": "cross"},
}
_PLACES = ("top", "bottom", "left", "right", "centre")
_FILLER_WORDS = (
    "a an the one at in on of to with against over is are there s be picture image scene drawing showing shows show "
    "draw please background plain solid empty nothing corner side edge colored coloured color colour shape object "
    "thing it"
)
_FILLERS = frozenset(_FILLER_WORDS.split())
_SEPARATORS = frozenset({"and", ",", ";", ".", ":"})
_IGNORED_MARKS = frozenset("!\"'-()")


def with_article(words: str) -> str:
    """The words with their article: "a red circle", "an orange star"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def join_words(parts: Sequence[str], last: str = " and ") -> str:
    """A list in words: ["x", "y", "z"] as "x, y and z"."""
    return last.join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def name_of(obj: SceneObject) -> str:
    """The name of an object: "large red circle"."""
    return f"{obj.size} {obj.color} {obj.shape}"


def describe(scene: Scene) -> str:
    """The canonical description: "a large red circle at the top left and a small blue star at the centre on a white
    background". Objects come in reading order; the jitter is left out. Without objects: "an empty white background".
    """
    if not scene.objects:
        return f"an empty {scene.background} background"
    objects = [f"{with_article(name_of(obj))} at the {obj.position}" for obj in scene.objects]
    return f"{join_words(objects)} on {with_article(scene.background)} background"


@dataclass
class NamedObject:
    """What words say about an object; "" or [] for what they leave open."""

    shape: str = ""
    color: str = ""
    size: str = ""
    place: list[str] = field(default_factory=list)

    @property
    def position(self) -> str:
        """The cell that the words of the place mean in any order ("left top" is "top left"); "" from none."""
        rows, columns = (
            [word for word in pair if word in self.place] for pair in (("top", "bottom"), ("left", "right"))
        )
        if len(rows) > 1 or len(columns) > 1:
            raise ValueError(
                f"an object cannot be at the {' and the '.join(self.place)}: name one place for each object"
            )
        return " ".join(rows + columns) or ("centre" if self.place else "")

    @property
    def begun(self) -> bool:
        """Whether there is an object at all; a size alone is none: "a large white background"."""
        return bool(self.shape or self.color or self.place)


def parse_scene(text: str) -> Scene:
    """The scene that a description means, without jitter: a tolerant inverse of `describe`.

    What is left out is filled in: size "large", background "white", the next color that is not used yet, the next free
    cell beginning at the centre.

    Raises ValueError, which quotes the unknown word and lists the words of this world, or says what is contradictory.
    """
    named, background = _read(text)
    return Scene(_finish(named, text), background or DEFAULT_BACKGROUND)


def named_objects(text: str) -> list[NamedObject]:
    """The objects of a description as far as its words go, in their order. Raises ValueError for what is unknown."""
    return _read(text)[0]


def _read(text: str) -> tuple[list[NamedObject], str]:
    """The objects that a description names, and the background, "" if it names none."""
    words = [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+|\S", text.lower())]
    words = [word for word in words if word not in _IGNORED_MARKS]
    drafts, background = [NamedObject()], ""
    for index, word in enumerate(words):
        before, after = words[max(index - 2, 0) : index], words[index + 1 : index + 2]
        if word in BACKGROUNDS:
            if after and after[0] in (*SHAPES, *COLORS, *SIZES):
                raise ValueError(f"{word} is a background; a {after[0]} cannot be {word}. {_vocabulary()}")
            if background not in ("", word):
                raise ValueError(f"two backgrounds in {text!r}: {background} and {word}; name one")
            background = word
        elif word in COLORS and (after == ["background"] or before == ["background", "is"]):
            raise ValueError(f"no background is {word}. {_vocabulary()}")
        elif not _take(drafts, word):
            raise ValueError(f"{word!r} was not understood in {text!r}. {_vocabulary()}")
    drafts = [draft for draft in drafts if draft.begun]
    if not drafts and not background:
        raise ValueError(f"no object and no background in {text!r}. {_vocabulary()}")
    shapeless = [draft for draft in drafts if not draft.shape]
    if shapeless:
        said = " ".join(filter(None, (shapeless[0].size, shapeless[0].color, *shapeless[0].place)))
        raise ValueError(f"which shape is {said!r} in {text!r}? {_vocabulary()}")
    return drafts, background


def _take(drafts: list[NamedObject], word: str) -> bool:
    """Add a word to the newest draft, or to a fresh one where a new object begins. Returns False if it is unknown."""
    draft = drafts[-1]
    if word in _SEPARATORS:
        # "a red circle, top left": a comma may stand before the place, so it only ends an object that has one.
        if draft.shape and (draft.place or word != ","):
            drafts.append(NamedObject())
    elif word in _PLACES:
        draft.place.append(word)
    elif word in SHAPES or word in COLORS or word in SIZES:
        if draft.shape:
            draft = NamedObject()
            drafts.append(draft)
        kind = "shape" if word in SHAPES else "color" if word in COLORS else "size"
        known = getattr(draft, kind)
        if known:
            raise ValueError(f"{known!r} and {word!r} for one object: name one {kind} for each object")
        setattr(draft, kind, word)
    else:
        return word in _FILLERS
    return True


def _finish(drafts: list[NamedObject], text: str) -> tuple[SceneObject, ...]:
    """Objects from drafts, with defaults for what is missing."""
    places = [draft.position for draft in drafts]
    free_cells = (cell for cell in FREE_CELLS if cell not in places)
    colors = [draft.color for draft in drafts]
    free_colors = [color for color in COLORS if color not in colors]
    objects = []
    for draft, place in zip(drafts, places, strict=True):
        position = place or next(free_cells, "")
        if not position:
            raise ValueError(f"{len(drafts)} objects in {text!r}: there are only {len(POSITIONS)} cells, so name fewer")
        color = draft.color or (free_colors.pop(0) if free_colors else next(iter(COLORS)))
        objects.append(SceneObject(draft.shape, color, draft.size or DEFAULT_SIZE, position))
    return tuple(objects)


def _vocabulary() -> str:
    lists = {"shapes": SHAPES, "colors": COLORS, "sizes": SIZES, "positions": POSITIONS, "backgrounds": BACKGROUNDS}
    known = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in lists.items())
    return f"Known {known}. Example: a large red circle at the top left and a small blue star on a white background."
