"""The procedural world of the built-in model: its scenes, their words, the tasks, and the scorer.

    scenes.py        what an image shows, and the split into training and evaluation
    drawing.py       scenes as pixels, masks and patch labels
    edits.py         changes of a scene, and the region that each changes
    degrade.py       degraded images
    descriptions.py  the canonical description of a scene, and a parser of what people type
    phrasing.py      variation of wording, and references to an object
    captions.py      descriptions in varied words, complete and terse
    prompts.py       instructions of every task, and edits in words
    questions.py     questions with their answers
    pairs.py         questions about two images in one message
    masking.py       masks of edits, and images to complete
    clutter.py       what people type around a prompt, and what lies outside the world
    tasks.py         dialogues of one or more tasks, to train and to evaluate on
    scoring.py       what an image shows, read from its pixels

NumPy, Pillow and the standard library only; nothing here knows of a model.
"""

from .captions import caption, mentions, terse_caption
from .clutter import OUTSIDE, cluttered, retyped
from .degrade import DEGRADATIONS, degrade
from .descriptions import describe, parse_scene
from .drawing import LABEL_CLASSES, draw, masks, patch_labels
from .edits import EDIT_KINDS, Edit, edit_region, random_edit, region_image
from .masking import to_mask, to_patches
from .prompts import TASK_INSTRUCTIONS, instruction
from .questions import QUESTION_KINDS
from .scenes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    random_scene,
    scene_from_seed,
    split_of,
)
from .scoring import Comparison, DetectedObject, Reading, compare, read_region, read_scene
from .tasks import LATER_TASKS, TASKS, Dialogue, NoSceneFoundError, Task, random_dialogue

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "COLORS",
    "DEGRADATIONS",
    "EDIT_KINDS",
    "LABEL_CLASSES",
    "LATER_TASKS",
    "OUTSIDE",
    "POSITIONS",
    "QUESTION_KINDS",
    "SHAPES",
    "SIZES",
    "TASKS",
    "TASK_INSTRUCTIONS",
    "Comparison",
    "DetectedObject",
    "Dialogue",
    "Edit",
    "NoSceneFoundError",
    "Reading",
    "Scene",
    "SceneObject",
    "Task",
    "caption",
    "cluttered",
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
    "region_image",
    "retyped",
    "scene_from_seed",
    "split_of",
    "terse_caption",
    "to_mask",
    "to_patches",
]
