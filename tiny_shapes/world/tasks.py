"""What the built-in model is taught and examined on: dialogues of one or more rounds about pictures of this world.

Notable:
- A dialogue is a walk: what stands in view after a round (a scene, with or without a defect, or nothing yet) decides
  what may be asked next. Understanding and drawing mix freely; a drawn picture is edited, described, refined in turn.
- Every scene that a dialogue shows, as a source or as a target, belongs to the one split that was asked for.
- A drawing round has one right picture; only "generate" leaves the jitter of things open.
- Where there is no picture in view yet, the round that needs one brings it attached.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from .degrade import degrade
from .descriptions import describe, parse_scene
from .drawing import draw
from .edits import EDIT_KINDS, Edit, random_edit, region_picture
from .language import brief, caption, edit_words, prompt
from .questions import QUESTION_KINDS, question, talk
from .scenes import Scene, Thing, random_scene, split_of
from .wording import pick

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
FAMILIES = tuple(dict.fromkeys(task.split("/")[0] for task in TASKS))

# The defect that a task mends; where the picture is sound already the task leaves it as it is.
_MENDS = MappingProxyType({"super-resolution": "pixelated", "denoise": "noisy", "colorize": "grey"})
_ENHANCING = (*_MENDS, "refine")
_ENHANCING_SOUND = 0.25  # how much rarer an enhancing task is on a sound picture in view (refine: as usual)
_ALSO_GREY = 0.3  # share of pixelated and noisy pictures that are grey besides, where colorizing is a task too
_BRIEF = 0.5  # share of drawings that are asked for in few words
_BARE = 0.4  # share of those whose few words are all that is typed
_ROUNDS = (0.6, 0.2, 0.1, 0.06, 0.04)  # shares of dialogues of one to five rounds
_SAME_EDIT = 0.7  # share of identified regions whose edit is asked for next
_ATTEMPTS = 4000  # scenes tried before a wish is called impossible: a few in training, hundreds in long eval chains


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Round:
    """One prompt and what answers it: either `answer` (text) or `target` (a picture), never both.

    Pictures are uint8 [128, 128, 3]. `attached` comes with the prompt; None if a picture is in view or none is needed.
    `task` is a key of `TASKS`. `source_scene` is what stood in view when the prompt came (None: no picture),
    `target_scene` what the target shows; None for answers in text and for the picture of a region. `meant` is the one
    thing that the prompt is about, as it is before an edit (added: as it will be); None if there is no one.
    """

    prompt: str
    attached: np.ndarray | None
    answer: str | None
    target: np.ndarray | None
    task: str
    target_scene: Scene | None = None
    source_scene: Scene | None = None
    meant: Thing | None = None

    @property
    def family(self) -> str:
        """The task without its kind: "edit" of "edit/move"."""
        return self.task.split("/")[0]


@dataclass(frozen=True, eq=False)
class Dialogue:
    """Rounds of one conversation, in order."""

    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class _Step:
    """A round that is planned.

    `edit_kind`: the edit whose region is identified. `same_edit`: this round asks for that very edit. `grey`: the
    picture to enhance is grey besides.
    """

    task: str
    edit_kind: str = ""
    same_edit: bool = False
    grey: bool = False


@dataclass(frozen=True)
class _Rules:
    """What every scene of a dialogue keeps to."""

    things: tuple[int, int]
    split: str

    def fits(self, task: str, count: int) -> bool:
        """Whether the task leaves a scene of `count` things within the wanted numbers."""
        if task == "edit/remove":
            return count > self.things[0]
        return task != "edit/add" or count < self.things[1]


@dataclass(frozen=True)
class _View:
    """What stands in view: a scene, the defects its newest picture has, and whether that picture was shown yet.

    `planned` is the edit whose region was just identified. `seed` fixes the noise of the defects.
    """

    scene: Scene
    defects: tuple[str, ...]
    shown: bool
    seed: int
    planned: Edit | None = None

    def picture(self) -> np.ndarray:
        """The newest picture: grey comes last, so that the noise of a grey picture is grey as well."""
        pixels = draw(self.scene)
        for defect in sorted(self.defects, key=lambda defect: defect == "grey"):
            pixels = degrade(pixels, defect, self.seed)
        return pixels


def random_dialogue(
    rng: np.random.Generator,
    tasks: Iterable[str] | Mapping[str, float] | None = None,
    things: tuple[int, int] = (1, 3),
    split: str = "train",
    rounds: int | None = None,
) -> Dialogue:
    """A random dialogue; all randomness is drawn from `rng`.

    `tasks`: names of tasks or families ("edit", "edit/move"), with weights if a mapping, to which the dialogue keeps;
    None is the mixture `TASKS`. `things`: fewest and most in every scene shown. `split`: "train" or "eval".
    `rounds`: how many; None is one to five.
    Raises ValueError for unknown tasks and for wishes that cannot be met, such as removing from a lone thing.
    """
    weights = _weights(tasks)
    if rounds is None:
        rounds = 1 + int(rng.choice(len(_ROUNDS), p=_ROUNDS))
    # The plan is made first and then kept, however many scenes have to be tried: else tasks whose targets are rarely in
    # a small split would come up too seldom.
    rules = _Rules(things, split)
    count, plan = _plan(rng, weights, rules, rounds)
    for _ in range(_ATTEMPTS):
        dialogue = _play(rng, plan, count, rules)
        if dialogue is not None:
            return dialogue
    raise ValueError(f"found no scenes for {[step.task for step in plan]} with {things} things in the split {split!r}")


def _weights(tasks: Iterable[str] | Mapping[str, float] | None) -> dict[str, float]:
    """Weight of every wanted task; a family's weight is shared among its tasks in the proportions of `TASKS`."""
    if tasks is None:
        return dict(TASKS)
    if isinstance(tasks, str):
        tasks = (tasks,)
    weights: dict[str, float] = {}
    for name in tasks:
        members = {task: share for task, share in TASKS.items() if name in (task, task.split("/")[0])}
        if not members:
            raise ValueError(f"{name!r} is not a task; choose from the families {', '.join(FAMILIES)} or from TASKS")
        whole = sum(members.values())
        wanted = tasks[name] if isinstance(tasks, Mapping) else whole
        for task, share in members.items():
            weights[task] = weights.get(task, 0.0) + wanted * share / whole
    return weights


# --- planning: which tasks follow one another -----------------------------------------------------------------------


def _plan(
    rng: np.random.Generator, weights: Mapping[str, float], rules: _Rules, rounds: int
) -> tuple[int, list[_Step]]:
    """How many things the first scene has, and the step of every round."""
    fewest, most = rules.things
    counts = {task: [n for n in range(fewest, most + 1) if rules.fits(task, n)] for task in weights}
    options = {task: weight for task, weight in weights.items() if counts[task]}
    if not options:
        raise ValueError(f"none of {', '.join(weights)} fits scenes of {fewest} to {most} things")
    task = _weighted(rng, options)
    first = count = pick(rng, counts[task])
    grey = task in ("super-resolution", "denoise") and "colorize" in weights and rng.random() < _ALSO_GREY
    plan, in_view = [_step(rng, task, count, rules, grey)], False
    while len(plan) < rounds:
        before = plan[-1]
        in_view = in_view or before.task != "chat"
        count += {"edit/add": 1, "edit/remove": -1}.get(before.task, 0)
        plan.append(_Step("colorize") if before.grey else _next(rng, weights, before, in_view, count, rules))
    return first, plan


def _next(
    rng: np.random.Generator, weights: Mapping[str, float], before: _Step, in_view: bool, count: int, rules: _Rules
) -> _Step:
    """The step that follows `before` when `count` things are in view, or no picture yet."""
    same = f"edit/{before.edit_kind}"
    if before.task == "identify region" and same in weights and rng.random() < _SAME_EDIT:
        return _Step(same, before.edit_kind, same_edit=True)
    options = {
        task: weight * (_ENHANCING_SOUND if in_view and task in _MENDS else 1.0)
        for task, weight in weights.items()
        if rules.fits(task, count) and not (in_view and task == "generate")
    }
    if before.task == "identify region":
        # The newest picture is of a region now, so "the picture" would be ambiguous: name things where the tasks allow.
        options = {task: weight for task, weight in options.items() if task.startswith("edit/")} or options
    if not options:
        raise ValueError(f"after {before.task!r} none of {', '.join(weights)} can follow; ask for fewer rounds")
    return _step(rng, _weighted(rng, options), count, rules)


def _step(rng: np.random.Generator, task: str, count: int, rules: _Rules, grey: bool = False) -> _Step:
    kinds = [kind for kind in EDIT_KINDS if rules.fits(f"edit/{kind}", count)]
    return _Step(task, pick(rng, kinds) if task == "identify region" else "", grey=grey)


def _weighted(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    shares = np.array(list(weights.values()), dtype=np.float64)
    return list(weights)[int(rng.choice(len(shares), p=shares / shares.sum()))]


# --- playing: the plan with a scene ---------------------------------------------------------------------------------

_Played = tuple[Round, _View] | None


def _play(rng: np.random.Generator, plan: list[_Step], count: int, rules: _Rules) -> Dialogue | None:
    """The planned rounds on a fresh scene; None when it does not admit them in this split."""
    scene = random_scene(rng, (count, count), rules.split)
    pictured = next((step for step in plan if step.task != "chat"), plan[0])
    view = _View(scene, _first_defects(rng, pictured), shown=False, seed=int(rng.integers(2**32)))
    rounds = []
    for step in plan:
        played = _PLAYERS[step.task.split("/")[0]](rng, step, view, rules)
        if played is None:
            return None
        turn, after = played
        if not view.shown and after.shown and step.task != "generate":
            turn = replace(turn, attached=view.picture())
        rounds.append(turn)
        view = after
    return Dialogue(tuple(rounds))


def _first_defects(rng: np.random.Generator, step: _Step) -> tuple[str, ...]:
    """What is wrong with the picture that the first round with one brings."""
    if step.task == "refine":
        return (pick(rng, ("blurred", "noisy")),)
    if step.task in _MENDS:
        return (_MENDS[step.task], *(["grey"] if step.grey else []))
    return ()


def _talk(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    asked, answer = talk(rng)
    return Round(asked, None, answer, None, step.task, None, view.scene if view.shown else None), view


def _describe(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    asked = prompt(rng, "describe")
    return Round(asked, None, describe(view.scene), None, step.task, None, view.scene), replace(view, shown=True)


def _question(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    asked = question(rng, view.scene, step.task.split("/")[1])
    if asked is None:
        return None
    turn = Round(asked.text, None, asked.answer, None, step.task, None, view.scene, asked.thing)
    return turn, replace(view, shown=True)


def _generate(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    scene = view.scene
    if rng.random() < _BRIEF:
        text = brief(rng, scene)
        scene = _with_jitter(parse_scene(text), scene)
        if split_of(scene) != rules.split:
            return None
        asked = text if rng.random() < _BARE else prompt(rng, "generate", text)
    else:
        asked = prompt(rng, "generate", caption(rng, scene))
    return Round(asked, None, None, draw(scene), step.task, scene, None), replace(view, scene=scene, shown=True)


def _with_jitter(scene: Scene, other: Scene) -> Scene:
    """The scene with the jitter of another one that has as many things."""
    things = (replace(thing, dx=old.dx, dy=old.dy) for thing, old in zip(scene.things, other.things, strict=True))
    return replace(scene, things=tuple(things))


def _edit(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    kind = step.task.split("/")[1]
    edit = view.planned if step.same_edit else random_edit(rng, view.scene, kind, rules.things, rules.split)
    if edit is None:
        return None
    target = edit.apply(view.scene)
    asked = prompt(rng, "edit", edit_words(rng, view.scene, edit))
    after = replace(view, scene=target, shown=True, planned=None)
    return Round(asked, None, None, draw(target), step.task, target, view.scene, edit.thing), after


def _identify(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    edit = random_edit(rng, view.scene, step.edit_kind, rules.things, rules.split)
    if edit is None:
        return None
    asked = prompt(rng, "identify region", edit_words(rng, view.scene, edit).rstrip("."))
    region = region_picture(view.scene, edit.apply(view.scene))
    turn = Round(asked, None, None, region, step.task, None, view.scene, edit.thing)
    return turn, replace(view, shown=True, planned=edit)


def _enhance(rng: np.random.Generator, step: _Step, view: _View, rules: _Rules) -> _Played:
    """Refining mends all, the others their own defect; what has none stays as it is."""
    mended = () if step.task == "refine" else tuple(name for name in view.defects if name != _MENDS[step.task])
    # A grey picture cannot be colorized without being told the colours; the others need no description.
    told = step.task == "colorize" or (step.task != "refine" and rng.random() < 0.4)
    asked = prompt(rng, step.task, caption(rng, view.scene) if told else "")
    after = replace(view, defects=mended, shown=True, planned=None)
    return Round(asked, None, None, after.picture(), step.task, view.scene, view.scene), after


# Each gives the round, its attached picture left out, and the view after it; None when the scene does not admit it.
_PLAYERS = MappingProxyType(
    {
        "chat": _talk,
        "describe": _describe,
        "question": _question,
        "generate": _generate,
        "edit": _edit,
        "identify region": _identify,
        **dict.fromkeys(_ENHANCING, _enhance),
    }
)
