"""The procedural picture world of the built-in model: scenes, their pictures, captions, tasks and the scorer.

NumPy, Pillow and the standard library only; nothing here knows of a model.
"""

from .degrade import DEGRADATIONS, degrade
from .descriptions import describe, parse_scene
from .drawing import LABEL_CLASSES, draw, masks, patch_labels
from .edits import EDIT_KINDS, Edit, edit_region, random_edit, region_picture
from .language import TASK_INSTRUCTIONS, caption, instruction, mentions
from .questions import QUESTION_KINDS
from .reading import Comparison, FoundThing, Reading, compare, read_region, read_scene
from .scenes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    random_scene,
    scene_from_seed,
    split_of,
)
from .tasks import TASKS, Dialogue, Round, random_dialogue

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "COLORS",
    "DEGRADATIONS",
    "EDIT_KINDS",
    "LABEL_CLASSES",
    "POSITIONS",
    "QUESTION_KINDS",
    "SHAPES",
    "SIZES",
    "TASKS",
    "TASK_INSTRUCTIONS",
    "Comparison",
    "Dialogue",
    "Edit",
    "FoundThing",
    "Reading",
    "Round",
    "Scene",
    "Thing",
    "caption",
    "compare",
    "degrade",
    "describe",
    "draw",
    "edit_region",
    "instruction",
    "masks",
    "mentions",
    "parse_scene",
    "patch_labels",
    "random_dialogue",
    "random_edit",
    "random_scene",
    "read_region",
    "read_scene",
    "region_picture",
    "scene_from_seed",
    "split_of",
]
