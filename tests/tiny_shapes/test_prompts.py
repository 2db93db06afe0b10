"""Instructions, edits in words, questions with their answers, and talk about the world."""

import numpy as np
import pytest

from tiny_shapes.world import (
    COLORS,
    EDIT_KINDS,
    POSITIONS,
    QUESTION_KINDS,
    SHAPES,
    SIZES,
    TASK_INSTRUCTIONS,
    Edit,
    Scene,
    SceneObject,
    instruction,
    random_edit,
    random_scene,
    scene_from_seed,
)
from tiny_shapes.world.phrasing import refer_to
from tiny_shapes.world.prompts import edit_words, prompt
from tiny_shapes.world.questions import question, small_talk

NUMBERS = ["zero", "one", "two", "three"]


def named_in(text):
    """The attributes that a sentence names, British and American spelling alike."""
    words = text.lower().replace("center", "centre").replace("middle", "centre").replace("crosses", "cross")
    words = " ".join(word.rstrip("s") if word.rstrip("s") in SHAPES else word for word in words.strip(" ?.").split())
    words = words.replace("small or large", "")  # a question, not a description
    named = {kind: [name for name in names if name in words.split()] for kind, names in KINDS.items()}
    places = [cell for cell in sorted(POSITIONS, key=len, reverse=True) if f"at the {cell}" in words]
    named["position"] = places[:1]
    return {kind: names[0] for kind, names in named.items() if names}


KINDS = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES)}


def meant(scene, named):
    return [obj for obj in scene.objects if all(getattr(obj, kind) == name for kind, name in named.items())]


def test_the_published_instructions_are_kept_word_for_word():
    assert instruction("generate", "a red circle") == (
        "Please generate the corresponding image based on the description. a red circle"
    )
    assert instruction("describe") == "Please describe the picture in detail."
    assert instruction("identify region", "remove the star.") == (
        "Given the edit instruction: remove the star, please identify the editing region"
    )
    assert instruction("refine") == "Refine the image for better clarity."
    assert instruction("edit", " Remove the star. ") == "Remove the star."


@pytest.mark.parametrize("task", TASK_INSTRUCTIONS)
def test_every_instruction_reads_well_without_text_and_keeps_braces_in_it(task):
    braces = instruction(task, "{odd} text")
    if task != "identify region":  # it has no meaning without the edit, and says so
        bare = instruction(task)
        assert bare == bare.strip() and "{" not in bare
    assert ("{odd} text" in braces) == ("{text}" in TASK_INSTRUCTIONS[task])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="super-resolution"):
        instruction("paint")


@pytest.mark.parametrize("task", [task for task in TASK_INSTRUCTIONS if task != "edit"])
def test_prompts_vary_and_use_the_instruction_itself_about_half_the_time(task):
    rng = np.random.default_rng(0)
    prompts = [prompt(rng, task, "A star.") for _ in range(200)]
    opening = TASK_INSTRUCTIONS[task].split("{text}")[0].strip()
    assert 60 < sum(text.startswith(opening) for text in prompts) < 140
    assert len(set(prompts)) >= 4


def test_a_reference_means_one_object_only_and_never_tells_what_is_hidden():
    rng = np.random.default_rng(1)
    for seed in range(300):
        scene = scene_from_seed(seed, objects=(2, 3))
        for obj in scene.objects:
            assert meant(scene, named_in(refer_to(rng, scene, obj))) == [obj]
            for hidden in ("color", "shape", "size", "position"):
                words = refer_to(rng, scene, obj, hide=(hidden,))
                assert words is None or hidden not in named_in(words)


def test_a_lone_object_may_be_called_it_and_one_of_several_never():
    rng = np.random.default_rng(1)
    for objects, called_it in (((1, 1), True), ((2, 3), False)):
        words = [refer_to(rng, scene, scene.objects[0]) for scene in map(scene_from_seed, range(80), [objects] * 80)]
        assert ("it" in words) == called_it


def test_what_is_added_without_its_place_goes_to_the_first_free_cell():
    rng = np.random.default_rng(0)
    beside = Scene((SceneObject("circle", "red", "large", "centre"),), "white")
    edit = Edit("add", SceneObject("star", "blue", "large", "left"))
    texts = [edit_words(rng, beside, edit) for _ in range(40)]
    unplaced = [text for text in texts if "left" not in text]
    assert unplaced and len(unplaced) < 40
    elsewhere = Edit("add", SceneObject("star", "blue", "large", "right"))
    assert all("right" in edit_words(rng, beside, elsewhere) for _ in range(40))


def test_what_nothing_singles_out_has_no_reference():
    twins = Scene((SceneObject("star", "red", "small", "left"), SceneObject("star", "red", "small", "right")), "white")
    rng = np.random.default_rng(0)
    assert refer_to(rng, twins, twins.objects[0], hide=("position",)) is None
    assert refer_to(rng, twins, twins.objects[0]).endswith("at the left")
    assert question(rng, twins, "where") is None


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_in_words_names_its_object_and_its_value(kind):
    rng = np.random.default_rng(2)
    for seed in range(200):
        scene = scene_from_seed(seed, objects=(2, 2))
        edit = random_edit(rng, scene, kind)
        text = edit_words(rng, scene, edit)
        assert text.endswith(".") and "{" not in text
        value = edit.value.replace("gray", "gr").replace("centre", "")
        assert value in text.replace("grey", "gray")
        if kind == "remove":
            assert meant(scene, named_in(text.replace(" away", ""))) == [edit.subject]
        if kind == "add":
            assert edit.subject.shape in text and edit.subject.color in text


@pytest.mark.parametrize("kind", ["color", "shape", "size", "where"])
def test_answers_about_an_object_are_true(kind):
    rng = np.random.default_rng(3)
    attribute = "position" if kind == "where" else kind
    asked = 0
    for seed in range(300):
        scene = scene_from_seed(seed)
        found = question(rng, scene, kind)
        if found is None:
            continue
        objects = meant(scene, named_in(found.text))
        if found.answer == "nothing":
            assert objects == [] and found.subject is None
        else:
            assert objects == [found.subject]
            assert getattr(found.subject, attribute) == found.answer.removeprefix("at the ")
        asked += 1
    assert asked > 250


def test_counts_are_true():
    rng = np.random.default_rng(4)
    for seed in range(300):
        scene = scene_from_seed(seed)
        asked, answer, obj = question(rng, scene, "count")
        assert answer == NUMBERS[len(meant(scene, named_in(asked)))] and obj is None


def test_yes_and_no_are_true_and_about_equally_often():
    rng = np.random.default_rng(5)
    answers = []
    for seed in range(600):
        scene = scene_from_seed(seed)
        asked, answer, obj = question(rng, scene, "exists")
        objects = meant(scene, named_in(asked))
        assert answer == ("yes" if objects else "no")
        assert obj == (objects[0] if len(objects) == 1 else None)
        answers.append(answer)
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_the_background_is_answered_by_its_name():
    rng = np.random.default_rng(6)
    for seed in range(30):
        scene = scene_from_seed(seed)
        assert question(rng, scene, "background").answer == scene.background


def test_questions_can_be_asked_of_an_empty_scene():
    rng = np.random.default_rng(7)
    empty = Scene((), "mint")
    asked = {kind: question(rng, empty, kind) for kind in QUESTION_KINDS for _ in range(10)}
    assert asked["count"].answer == "zero" and asked["exists"].answer == "no" and asked["background"].answer == "mint"
    assert asked["color"] is asked["where"] is asked["size"] is None


def test_an_unknown_question_is_refused():
    with pytest.raises(ValueError, match="color, shape"):
        question(np.random.default_rng(0), scene_from_seed(0), "taste")


def test_one_question_about_the_world_has_one_answer():
    rng = np.random.default_rng(8)
    answers = {}
    for _ in range(3000):
        asked, answer = small_talk(rng)
        answers.setdefault(asked.lower().rstrip("."), set()).add(answer)
    assert all(len(given) == 1 for given in answers.values())
    assert answers["which shapes do you know?"] == {"circle, square, triangle, star, diamond and cross"}
    assert {"yes"} in answers.values() and {"no"} in answers.values()


def test_one_wording_of_a_question_has_one_answer_in_a_scene():
    rng = np.random.default_rng(9)
    scene = random_scene(rng, (3, 3))
    for kind in QUESTION_KINDS:
        answers = {}
        for _ in range(200):
            asked = question(rng, scene, kind)
            if asked:
                answers.setdefault(asked.text.lower(), set()).add(asked.answer)
        assert all(len(given) == 1 for given in answers.values())
