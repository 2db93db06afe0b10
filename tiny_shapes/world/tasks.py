"""Tasks and dialogues: what the built-in model is trained and evaluated on.

Notable:
- A dialogue is a random walk: what is in view after a round (a scene, with or without a defect, or nothing yet) decides
  which task may come next. Understanding and drawing mix freely; a drawn image is edited, described, refined later on.
- Every scene that a dialogue shows, as a source or as a target, belongs to the split that was asked for.
- A drawing task has one right image; only "generate" and "few words" leave the jitter of objects open.
- The first task that needs an image brings it attached if there is none in view yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from .captions import caption, terse_caption
from .clutter import OUTSIDE, outside
from .degrade import degrade
from .descriptions import describe, parse_scene
from .drawing import draw
from .edits import EDIT_KINDS, Edit, random_edit, region_image
from .masking import completion_mask, edit_mask, grown, padded_image, to_mask, to_patches, visible_part
from .pairs import PAIR_KINDS, ask_difference, ask_one, ask_which
from .phrasing import pick
from .prompts import completion_words, edit_words, prompt
from .questions import QUESTION_KINDS, Question, question, small_talk
from .scenes import COLORS, Scene, SceneObject, random_scene, split_of
from .scoring import read_region

# Every task, with its share of the default mixture. The part before "/" is the family, by which tasks are also chosen.
TASKS: Mapping[str, float] = MappingProxyType(
    {
        "describe": 2.0,
        **{f"question/{kind}": 0.6 for kind in QUESTION_KINDS},
        "generate": 5.0,
        **{f"edit/{kind}": 1.0 for kind in EDIT_KINDS},
        "identify region": 1.0,
        "refine": 0.6,
        "super-resolution": 0.6,
        "denoise": 0.6,
        "colorize": 0.8,
        "chat": 0.6,
    }
)
# Tasks that came later, with their shares of their families. The default mixture stays what it was.
LATER_TASKS: Mapping[str, float] = MappingProxyType(
    {
        **{f"masked edit/{kind}": 1.0 for kind in EDIT_KINDS if kind != "background"},
        "complete": 1.0,
        **{f"pair/{kind}": share for kind, share in zip(PAIR_KINDS, (3.0, 1.0, 2.0), strict=True)},
        "outside": 1.0,
        "few words": 1.0,
        "color again": 1.0,
    }
)
_ALL_TASKS = {**TASKS, **LATER_TASKS}
FAMILIES = tuple(dict.fromkeys(name.split("/")[0] for name in _ALL_TASKS))

_WITHOUT_IMAGE = ("chat", "outside")  # tasks that bring no image into view
DRAWINGS = ("generate", "few words")  # families of images from words alone
_FIRST_IMAGE = (*DRAWINGS, "complete")  # families that come only while no image is in view

# The defect that a task repairs. An image without that defect is to stay as it is.
_REPAIRS = MappingProxyType({"super-resolution": "pixelated", "denoise": "noisy", "colorize": "grey"})
_ENHANCING = (*_REPAIRS, "refine")
_ENHANCING_INTACT = 0.25  # factor on the weight of such a task for an intact image in view (refine: 1)
_ALSO_GREY = 0.3  # share of pixelated and noisy images that are grey as well, if colorizing is among the tasks
_TERSE = 0.5  # share of drawings with a terse prompt
_BARE = 0.4  # share of those with nothing but the terse caption in the prompt
_COLORED, _PLACED = 0.7, 0.3  # shares of the objects of "few words" whose color is named, and whose place is
_ROUNDS = (0.6, 0.2, 0.1, 0.06, 0.04)  # shares of dialogues of one to five rounds
_SAME_EDIT = 0.7  # share of identified regions after which that very edit is asked for
_SHOWN_AGAIN = 0.6  # share of masked edits after their region that bring the image again, and the mask of that region
_REGION_MARGIN = 1  # patches by which such a mask is grown: the default of Ming Region Mask
_WHOLE = 0.15  # share of completions without a mask
_RELATED = 0.4  # share of pairs of scenes of which the second is an edit of the first
_ATTEMPTS = 4000  # scenes to try before giving up: a few are enough in training, hundreds in long evaluation chains


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Task:
    """One prompt and what answers it: either `answer` (text) or `target` (an image), never both.

    prompt        what the user types
    attached      uint8 [128, 128, 3], the image that comes with the prompt; None if one is in view or none is needed
    answer        the right text
    target        uint8 [128, 128, 3], the right image
    name          a key of `TASKS` or `LATER_TASKS`
    target_scene  what the target shows; None for answers in text and for the image of a region
    source_scene  what is in view when the prompt comes; None: no image
    subject       the one object that the prompt is about, as it is before an edit (added: as it will be); None if there
                  is not one
    mask          bool [128, 128], where the newest image in view may change; None: everywhere
    second        uint8 [128, 128, 3], another image that comes with the prompt, after `attached`; None: no such one
    """

    prompt: str
    attached: np.ndarray | None
    answer: str | None
    target: np.ndarray | None
    name: str
    target_scene: Scene | None = None
    source_scene: Scene | None = None
    subject: SceneObject | None = None
    mask: np.ndarray | None = None
    second: np.ndarray | None = None

    @property
    def family(self) -> str:
        """The name without its kind: "edit" of "edit/move"."""
        return self.name.split("/")[0]


_Field = TypeVar("_Field")


def require(field: _Field | None) -> _Field:
    """A field that every task of a name has, such as the target of a drawing task. Raises ValueError if it is None."""
    if field is None:
        raise ValueError("this task has no such field: drawing tasks have a target, the others an answer")
    return field


@dataclass(frozen=True, eq=False)
class Dialogue:
    """The tasks of one conversation, one for each round, in order."""

    tasks: tuple[Task, ...]

    @property
    def edits_its_region(self) -> bool:
        """Whether the first round is the question for a region, and the second the edit that it is the region of."""
        first, second = self.tasks[:2]
        if first.name != "identify region" or "edit" not in second.family:
            return False
        region = region_image(require(second.source_scene), require(second.target_scene))
        return np.array_equal(require(first.target), region)  # another edit of the object may change other places


@dataclass(frozen=True)
class _Step:
    """A planned task.

    name       a key of `TASKS`
    edit_kind  of the edit whose region is to be identified
    same_edit  whether this task asks for the edit whose region was just identified
    grey       whether the image to enhance is grey as well
    """

    name: str
    edit_kind: str = ""
    same_edit: bool = False
    grey: bool = False


@dataclass(frozen=True)
class _Constraints:
    """What every scene of a dialogue must comply with: fewest and most objects, and the split; `alike` as in
    `random_scene`, for the first of them."""

    objects: tuple[int, int]
    split: str
    alike: float

    def allow(self, name: str, count: int) -> bool:
        """Whether the task leaves a scene of `count` objects within the limits."""
        if name.endswith("edit/remove"):
            return count > self.objects[0]
        return not name.endswith("edit/add") or count < self.objects[1]


@dataclass(frozen=True)
class _Pair:
    """Two scenes, and the edit from the first to the second if there is one."""

    first: Scene
    second: Scene
    edit: Edit | None = None


@dataclass(frozen=True)
class _State:
    """What is in view between two rounds.

    scene    what the newest image shows, or is going to show
    defects  of the newest image
    shown    whether that image is in view yet
    seed     of the noise of the defects
    planned  the edit whose region was just identified
    region   the image of that region
    pair     the two scenes that are in view as the first images of the dialogue, while questions are about both
    """

    scene: Scene
    defects: tuple[str, ...]
    shown: bool
    seed: int
    planned: Edit | None = None
    region: np.ndarray | None = None
    pair: _Pair | None = None

    def image(self) -> np.ndarray:
        """The newest image. Grey comes last, so that the noise of a grey image is grey as well."""
        pixels = draw(self.scene)
        for defect in sorted(self.defects, key=lambda defect: defect == "grey"):
            pixels = degrade(pixels, defect, self.seed)
        return pixels


class NoSceneFoundError(ValueError):
    """A split is too small for the tasks that were planned: one object in five eval scenes in a row, say."""


def random_dialogue(
    rng: np.random.Generator,
    tasks: Iterable[str] | Mapping[str, float] | None = None,
    objects: tuple[int, int] = (1, 3),
    split: str = "train",
    rounds: int | None = None,
    alike: float = 0.0,
) -> Dialogue:
    """A random dialogue; all randomness comes from `rng`.

    tasks    names of tasks or families ("edit", "edit/move") to choose from, with weights if it is a mapping; None: the
             mixture `TASKS`
    objects  fewest and most objects in every scene
    split    "train" or "eval"
    rounds   number of tasks; None: one to five
    alike    share of the first scenes whose objects are alike, as in `random_scene`

    Raises ValueError for unknown tasks, and for what is impossible, such as removing the only object; NoSceneFoundError
    where the split has no such scenes.
    """
    weights = _weights(tasks)
    if rounds is None:
        rounds = 1 + int(rng.choice(len(_ROUNDS), p=_ROUNDS))
    # The plan is made first and then kept, however many scenes have to be tried: otherwise tasks whose targets are
    # rarely in a small split would come up too seldom.
    constraints = _Constraints(objects, split, alike)
    count, plan = _plan(rng, weights, constraints, rounds)
    for _ in range(_ATTEMPTS):
        dialogue = _realize(rng, plan, count, constraints)
        if dialogue is not None:
            return dialogue
    names = [step.name for step in plan]
    raise NoSceneFoundError(
        f"found no scenes of {objects} objects for {names} in the split {split!r}: ask for fewer rounds"
    )


def _weights(tasks: Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    """The weight of every possible task; that of a family is shared among its tasks in the proportions of `TASKS`."""
    if tasks is None:
        return dict(TASKS)
    if isinstance(tasks, str):
        tasks = (tasks,)
    weights: dict[str, float] = {}
    for given in tasks:
        members = {name: share for name, share in _ALL_TASKS.items() if given in (name, name.split("/")[0])}
        if not members:
            raise ValueError(f"{given!r} is not a task: use a family ({', '.join(FAMILIES)}) or a key of TASKS")
        whole = sum(members.values())
        weight = tasks[given] if isinstance(tasks, Mapping) else whole
        for name, share in members.items():
            weights[name] = weights.get(name, 0.0) + weight * share / whole
    return weights


# --- The plan: which tasks follow one another -----------------------------------------------------------------------


def _plan(
    rng: np.random.Generator, weights: Mapping[str, float], constraints: _Constraints, rounds: int
) -> tuple[int, list[_Step]]:
    """The number of objects of the first scene, and the step of every round."""
    fewest, most = constraints.objects
    counts = {name: [n for n in range(fewest, most + 1) if constraints.allow(name, n)] for name in weights}
    options = {name: weight for name, weight in weights.items() if counts[name]}
    if not options:
        raise ValueError(f"none of {', '.join(weights)} fits scenes of {fewest} to {most} objects: allow more objects")
    name = _weighted(rng, options)
    first = count = pick(rng, counts[name])
    grey = name in ("super-resolution", "denoise") and "colorize" in weights and rng.random() < _ALSO_GREY
    plan, in_view = [_step(rng, name, count, constraints, grey)], False
    while len(plan) < rounds:
        before = plan[-1]
        in_view = in_view or before.name not in _WITHOUT_IMAGE
        count += {"add": 1, "remove": -1}.get(before.name.partition("edit/")[2], 0)
        plan.append(_Step("colorize") if before.grey else _next(rng, weights, before, in_view, count, constraints))
    return first, plan


def _next(
    rng: np.random.Generator,
    weights: Mapping[str, float],
    before: _Step,
    in_view: bool,
    count: int,
    constraints: _Constraints,
) -> _Step:
    """The step that follows `before` if `count` objects are in view, or no image yet."""
    same = [name for name in (f"edit/{before.edit_kind}", f"masked edit/{before.edit_kind}") if name in weights]
    if before.name == "identify region" and same and rng.random() < _SAME_EDIT:
        return _Step(same[0] if len(same) == 1 else pick(rng, same), before.edit_kind, same_edit=True)
    options = {
        name: weight * (_ENHANCING_INTACT if in_view and name in _REPAIRS else 1.0)
        for name, weight in weights.items()
        if constraints.allow(name, count) and (not in_view or _may_follow(name, before))
    }
    if before.name == "identify region":
        # The newest image is of a region now, so "the picture" would be ambiguous: prefer tasks that name objects.
        options = {name: weight for name, weight in options.items() if "edit/" in name} or options
    if not options:
        raise ValueError(f"none of {', '.join(weights)} can follow {before.name!r}: ask for fewer rounds")
    return _step(rng, _weighted(rng, options), count, constraints)


def _may_follow(name: str, before: _Step) -> bool:
    """Whether a task may come while an image is in view: questions about two images only among themselves."""
    if name.startswith("pair"):
        return before.name.startswith("pair")
    return name not in _FIRST_IMAGE


def _step(rng: np.random.Generator, name: str, count: int, constraints: _Constraints, grey: bool = False) -> _Step:
    kinds = [kind for kind in EDIT_KINDS if constraints.allow(f"edit/{kind}", count)]
    return _Step(name, pick(rng, kinds) if name == "identify region" else "", grey=grey)


def _weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    shares = np.array(list(weights.values()), dtype=np.float64)
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


# --- The dialogue: the plan with a scene ----------------------------------------------------------------------------

_Realized = tuple[Task, _State] | None


def _realize(rng: np.random.Generator, plan: list[_Step], count: int, constraints: _Constraints) -> Dialogue | None:
    """The planned tasks on a new scene; None if that does not allow them in this split."""
    scene = random_scene(rng, (count, count), constraints.split, constraints.alike)
    first_with_image = next((step for step in plan if step.name not in _WITHOUT_IMAGE), plan[0])
    state = _State(scene, _first_defects(rng, first_with_image), shown=False, seed=int(rng.integers(2**32)))
    tasks = []
    for step in plan:
        realized = _MAKERS[step.name.split("/")[0]](rng, step, state, constraints)
        if realized is None:
            return None
        task, after = realized
        if not state.shown and after.shown and task.attached is None and step.name not in DRAWINGS:
            task = replace(task, attached=state.image())
        tasks.append(task)
        state = after
    return Dialogue(tuple(tasks))


def _first_defects(rng: np.random.Generator, step: _Step) -> tuple[str, ...]:
    """The defects of the image that comes with the first task that needs one."""
    if step.name == "refine":
        return (pick(rng, ("blurred", "noisy")),)
    if step.name in _REPAIRS:
        return (_REPAIRS[step.name], *(["grey"] if step.grey else []))
    return ()


def _chat(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    text, answer = small_talk(rng)
    return Task(text, None, answer, None, step.name, None, state.scene if state.shown else None), state


def _describe(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    text, answer = prompt(rng, "describe"), describe(state.scene)
    return Task(text, None, answer, None, step.name, None, state.scene), replace(state, shown=True)


def _question(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    asked = question(rng, state.scene, step.name.split("/")[1])
    if asked is None:
        return None
    task = Task(asked.text, None, asked.answer, None, step.name, None, state.scene, asked.subject)
    return task, replace(state, shown=True)


def _generate(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    if rng.random() < _TERSE:
        return _draw_terse(rng, terse_caption(rng, state.scene), step, state, constraints)
    text = prompt(rng, "generate", caption(rng, state.scene))
    return Task(text, None, None, draw(state.scene), step.name, state.scene, None), replace(state, shown=True)


def _few_words(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    """A drawing whose words name some of the colors and places; which ones are left for the others is learned last."""
    terse = terse_caption(rng, state.scene, colored=_COLORED, placed=_PLACED)
    return _draw_terse(rng, terse, step, state, constraints)


def _draw_terse(
    rng: np.random.Generator, terse: str, step: _Step, state: _State, constraints: _Constraints
) -> _Realized:
    """The drawing that the terse caption asks for, in the scene that it means; None if that is of another split."""
    scene = _with_jitter(parse_scene(terse), state.scene)
    if split_of(scene) != constraints.split:
        return None
    text = terse if rng.random() < _BARE else prompt(rng, "generate", terse)
    return Task(text, None, None, draw(scene), step.name, scene, None), replace(state, scene=scene, shown=True)


def _with_jitter(scene: Scene, other: Scene) -> Scene:
    """The scene with the jitter of another one that has as many objects."""
    objects = (replace(obj, dx=old.dx, dy=old.dy) for obj, old in zip(scene.objects, other.objects, strict=True))
    return replace(scene, objects=tuple(objects))


def _edit(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    kind = step.name.split("/")[1]
    if step.same_edit:
        edit = state.planned
    else:
        edit = random_edit(rng, state.scene, kind, constraints.objects, constraints.split)
    if edit is None:
        return None
    target = edit.apply(state.scene)
    text = prompt(rng, "edit", edit_words(rng, state.scene, edit))
    after = replace(state, scene=target, shown=True, planned=None, region=None)
    task = Task(text, None, None, draw(target), step.name, target, state.scene, edit.subject)
    if task.family == "masked edit":
        task = _masked(rng, task, state, after, edit == state.planned)
    return task, after


def _masked(rng: np.random.Generator, task: Task, state: _State, after: _State, planned: bool) -> Task:
    """The edit with a mask; after its region, if it was `planned`, mostly with that, and with the image once more.

    The newest image in view is the one that is kept outside the mask, so that must not be the image of a region.
    """
    if state.region is None:
        return replace(task, mask=edit_mask(rng, state.scene, after.scene))
    if planned and rng.random() < _SHOWN_AGAIN:
        mask = to_mask(grown(to_patches(read_region(state.region)), _REGION_MARGIN))
    else:
        mask = edit_mask(rng, state.scene, after.scene)
    return replace(task, attached=state.image(), mask=mask)


def _complete(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    scene, (part, side) = state.scene, visible_part(rng)
    text = prompt(rng, "edit", completion_words(rng, scene, part, side))
    mask = None if rng.random() < _WHOLE else completion_mask(rng, part)
    task = Task(text, padded_image(scene, part), None, draw(scene), step.name, scene, scene, mask=mask)
    return task, replace(state, shown=True)


def _pair(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized | None:
    pair = state.pair or _scene_pair(rng, step, state.scene, constraints)
    if pair is None:
        return None
    asked: Question | None
    if step.name == "pair/which":
        asked = ask_which(rng, pair.first, pair.second)
    elif step.name == "pair/one":
        asked = ask_one(rng, pair.first, pair.second)
    elif pair.edit is None and pair.first != pair.second:
        return None  # two unrelated scenes: everything differs
    else:
        asked = ask_difference(rng, pair.edit)
    if asked is None:
        return None
    shown = (None, None) if state.pair else (draw(pair.first), draw(pair.second))
    task = Task(asked.text, shown[0], asked.answer, None, step.name, None, pair.first, asked.subject, second=shown[1])
    return task, replace(state, scene=pair.second, shown=True, pair=pair)  # it goes on with the newest image


def _scene_pair(rng: np.random.Generator, step: _Step, first: Scene, constraints: _Constraints) -> _Pair | None:
    """Another scene to compare with: an edit of the first one, that one itself, or an unrelated one."""
    if step.name != "pair/difference" and rng.random() >= _RELATED:
        return _Pair(first, random_scene(rng, (len(first.objects),) * 2, constraints.split))
    kind = pick(rng, ("recolor", "move", "background", ""))
    if not kind:
        return _Pair(first, first)
    edit = random_edit(rng, first, kind, constraints.objects, constraints.split)
    return None if edit is None else _Pair(first, edit.apply(first), edit)


def _outside(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    unseen = constraints.split == "eval"
    scene = state.scene if state.shown else None
    return Task(outside(rng, unseen), None, OUTSIDE, None, step.name, None, scene), state


def _identify(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    edit = random_edit(rng, state.scene, step.edit_kind, constraints.objects, constraints.split)
    if edit is None:
        return None
    text = prompt(rng, "identify region", edit_words(rng, state.scene, edit).rstrip("."))
    region = region_image(state.scene, edit.apply(state.scene))
    task = Task(text, None, None, region, step.name, None, state.scene, edit.subject)
    return task, replace(state, shown=True, planned=edit, region=region)


def _enhance(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    """Refining repairs all defects, the others their own; an intact image stays as it is."""
    left = () if step.name == "refine" else tuple(name for name in state.defects if name != _REPAIRS[step.name])
    # A grey image cannot be colorized without knowing the colors; the others need no description.
    described = step.name == "colorize" or (step.name != "refine" and rng.random() < 0.4)
    text = prompt(rng, step.name, caption(rng, state.scene) if described else "")
    after = replace(state, defects=left, shown=True, planned=None, region=None)
    return Task(text, None, None, after.image(), step.name, state.scene, state.scene), after


def _color_again(rng: np.random.Generator, step: _Step, state: _State, constraints: _Constraints) -> _Realized:
    """Colorizing an image that has colors, but not those of the description: a model may have guessed them.

    The image is attached, or the one in view.
    """
    others = _other_colors(rng, state.scene)
    if split_of(others) != constraints.split:
        return None
    if state.shown:
        described, attached = others, None
        left = tuple(name for name in state.defects if name != "grey")
        after = replace(state, scene=described, defects=left, planned=None, region=None)
    else:
        described, attached = state.scene, _faded(rng, draw(others))
        after = replace(state, shown=True)
    text = prompt(rng, "colorize", caption(rng, described))
    return Task(text, attached, None, after.image(), step.name, described, state.scene), after


def _other_colors(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with another color on every object."""
    objects = (replace(obj, color=pick(rng, [name for name in COLORS if name != obj.color])) for obj in scene.objects)
    return replace(scene, objects=tuple(objects))


def _faded(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The image between gray and its colors."""
    grey = degrade(image, "grey")
    return np.rint(grey + rng.random() * (image.astype(np.float64) - grey)).astype(np.uint8)


# Each makes the task, without its attached image, and the state after it; None if the scene does not allow it.
_MAKERS = MappingProxyType(
    {
        "chat": _chat,
        "describe": _describe,
        "question": _question,
        "generate": _generate,
        "few words": _few_words,
        "edit": _edit,
        "masked edit": _edit,
        "complete": _complete,
        "pair": _pair,
        "outside": _outside,
        "identify region": _identify,
        **dict.fromkeys(_ENHANCING, _enhance),
        "color again": _color_again,
    }
)
