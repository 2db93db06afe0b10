"""What comes through a link is held to the widget or socket that it goes to, as ComfyUI holds what is typed."""

import inspect
import math

import numpy as np
import pytest
import torch
from ming_univision.ming_core import Conversation, Features
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.nodes.inputs import check_inputs, checked
from ming_univision.nodes.widgets import MAX_SEED

SIDE = 32


@pytest.fixture(autouse=True)
def folders(tmp_path):
    with host.folders(output=tmp_path / "output", input=tmp_path / "input"), torch.inference_mode():
        yield


@pytest.fixture
def values(model, picture):
    """A value of each type of socket, and one of each common type that belongs to none."""
    loaded = host.Loaded(model, None, "small")
    return {
        "MING_UNIVISION": loaded,
        "MINGTOK": host.Loaded(model.mingtok, None, "small: MingTok", owner=loaded),
        "MING_FEATURES": picture,
        "MING_CONVERSATION": Conversation(),
        "LATENT": {"samples": picture.latents},
        "IMAGE": torch.rand(1, SIDE, SIDE, 3),
        "MASK": torch.ones(1, SIDE, SIDE),
        "STRING": "Blue.",
        "a list": [picture],
        "nothing": None,
        "a number": 3,
        "an array": np.zeros((1, SIDE, SIDE, 3)),
    }


def run(node_id: str, values: dict, **inputs):
    """Run a node with its widgets' defaults and the fitting values on its required sockets."""
    node = NODE_CLASS_MAPPINGS[node_id]
    required = node.INPUT_TYPES()["required"]
    given = {name: o["default"] if "default" in o else values.get(str(kind)) for name, (kind, o) in required.items()}
    return getattr(node(), node.FUNCTION)(**given | inputs)


# --- Widgets ------------------------------------------------------------------------------------------------------


def numbers():
    for node_id, node in NODE_CLASS_MAPPINGS.items():
        for name, (kind, options) in node.INPUT_TYPES()["required"].items():
            if kind in ("INT", "FLOAT"):
                yield node_id, name, kind, options


NUMBERS = [pytest.param(*case, id=f"{case[0]}.{case[1]}") for case in numbers()]


def passed(node_id: str, name: str, value: object) -> object:
    """The value that a node's own code gets where this one comes through the link."""
    return check_inputs(NODE_CLASS_MAPPINGS[node_id], {name: value})[name]


@pytest.mark.parametrize(("node_id", "name", "kind", "options"), NUMBERS)
def test_a_linked_number_is_held_to_the_range_of_its_widget(node_id, name, kind, options):
    for value in (options["min"], options["max"], options["default"]):
        assert passed(node_id, name, value) == value
    bad = [math.nan, math.inf, -math.inf, True, "3", None, [1], b"1", 1j, torch.ones(2), torch.ones((), device="meta")]
    if options["max"] != MAX_SEED:  # seeds have a test of their own
        bad += [options["min"] - 1, options["max"] + 1, 10**9, -(10**9), 10**400]
    if kind == "INT":
        bad += [options["default"] + 0.5, np.float32(1.5)]
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} is .+: it must be"):
            passed(node_id, name, value)


@pytest.mark.parametrize(("node_id", "name", "kind", "options"), NUMBERS)
def test_numbers_of_numpy_and_torch_come_as_plain_ones(node_id, name, kind, options):
    number = options["max"] if options["max"] < 100 else 64
    for value in (
        np.int64(number),
        np.uint8(number),
        np.float32(number),
        np.float64(number),
        np.array(number),
        torch.tensor(number),
        torch.tensor(float(number)),
        torch.tensor(number, dtype=torch.bfloat16),
        float(number),
    ):
        found = passed(node_id, name, value)
        assert found == number and type(found) is {"INT": int, "FLOAT": float}[kind]


def test_any_whole_number_is_a_seed_and_beyond_64_bits_they_begin_again():
    for value in (np.uint64(2**63 + 5), 2**63 + 5, 2**64 + 2**63 + 5, torch.tensor(2**63 + 5, dtype=torch.uint64)):
        assert passed("MingGenerate", "seed", value) == 2**63 + 5
    assert passed("MingGenerate", "seed", -1) == MAX_SEED


def test_pictures_of_a_numpy_seed_are_those_of_the_same_number(values):
    seed, widgets = 2**63 + 5, {"prompt": "A cat.", "steps": 2, "max_new_tokens": 2}
    (plain,), _, _ = run("MingGenerate", values, seed=seed, **widgets)
    values["MING_UNIVISION"].model.prefix_cache.clear()  # keys and values found there differ in rounding
    (linked,), _, _ = run("MingGenerate", values, seed=np.uint64(seed), **widgets | {"steps": torch.tensor(2)})
    assert torch.equal(plain.latents, linked.latents)


@pytest.mark.parametrize(
    ("node_id", "inputs", "words"),
    [
        ("MingGenerate", {"batch_size": 10**9}, "batch_size is 1000000000: it must be from 1 to 16"),
        ("MingGenerate", {"steps": 10**7}, "steps is 10000000: it must be from 1 to 64"),
        ("MingGenerate", {"steps": 10**10}, "steps is 10000000000: it must be from 1 to 64"),
        ("MingUnderstand", {"max_new_tokens": 10**12}, "max_new_tokens is 1000000000000: it must be from 1 to 4096"),
        ("MingExampleScene", {"size": 40_000}, "size is 40000: it must be from 64 to 1024"),
        ("MingExampleScene", {"size": -64}, "size is -64: it must be from 64 to 1024"),
        ("MingExampleScene", {"scene": "a red circle " * 10_000}, "the scene has 130000 characters"),
        ("MingConversationPicture", {"index": 0.5}, "index is 0.5: it must be a whole number"),
        ("MingFeaturesCompare", {"threshold": math.nan}, "threshold is nan: it must be a number from 0.0 to 2.0"),
    ],
)
def test_a_linked_value_beyond_its_range_is_refused_before_anything_is_computed(values, node_id, inputs, words):
    values["MING_UNIVISION"].model.network = None  # whatever touched the model would fail in other words
    with pytest.raises(ValueError, match=words):
        run(node_id, values, **inputs)


def combos():
    for node_id, node in NODE_CLASS_MAPPINGS.items():
        for name, (kind, _) in node.INPUT_TYPES()["required"].items():
            # the nodes check names of files, also before a run
            if isinstance(kind, list) and name not in ("file", "model_name", "lora_name"):
                yield node_id, name, kind


@pytest.mark.parametrize(("node_id", "name", "choices"), list(combos()))
def test_a_linked_choice_must_be_one_of_the_widget(node_id, name, choices):
    assert [passed(node_id, name, choice) for choice in choices] == choices
    for value in ("no such choice", "", None, 3, [choices[0]], np.array(choices), torch.ones(2)):
        with pytest.raises(ValueError, match=rf"^{name} is .+: choose one of \("):
            passed(node_id, name, value)


# --- Sockets ------------------------------------------------------------------------------------------------------


def sockets():
    for node_id, node in NODE_CLASS_MAPPINGS.items():
        declared = node.INPUT_TYPES()
        for group in ("required", "optional"):
            for name, (kind, _) in declared.get(group, {}).items():
                if isinstance(kind, str) and kind not in ("INT", "FLOAT", "BOOLEAN"):
                    yield node_id, name, kind, group == "optional"


SOCKETS = [pytest.param(*case, id=f"{case[0]}.{case[1]}") for case in sockets()]


@pytest.mark.parametrize(("node_id", "name", "kind", "optional"), SOCKETS)
def test_a_value_of_another_type_is_named_with_what_belongs_there(values, node_id, name, kind, optional):
    tensors = {"IMAGE", "MASK"}
    for other, value in values.items():
        if other == kind or ({other, kind} == tensors) or (optional and value is None):
            continue
        with pytest.raises(ValueError, match=rf"^{name} takes {kind}, and .+ came: connect \w") as error:
            run(node_id, values, **{name: value})
        if other.startswith("MING"):
            assert f"and {other} came" in str(error.value)


@pytest.mark.parametrize(("node_id", "name", "kind", "optional"), SOCKETS)
def test_a_value_of_the_right_type_passes_and_so_does_an_optional_socket_without_one(
    values, node_id, name, kind, optional
):
    node = NODE_CLASS_MAPPINGS[node_id]
    assert check_inputs(node, {name: values[kind]})[name] is values[kind]
    if optional:
        assert check_inputs(node, {name: None}) == {}


def test_inputs_are_checked_also_where_they_are_given_by_position():
    class Node:
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls):
            number = ("INT", {"default": 0, "min": 0, "max": 9})
            return {"required": {"number": number, "switch": ("BOOLEAN", {}), "other": ("AUDIO", {})}}

        def run(self, number, switch=True, other=None):
            return number, switch, other

    node, audio = checked(Node), object()
    assert node().run(np.int64(4)) == node().run(number=4.0) == (4, True, None)
    assert node().run(4, np.bool_(False), audio) == (4, False, audio)  # a type of another pack goes through
    with pytest.raises(ValueError, match="number is 10: it must be from 0 to 9"):
        node().run(10)
    with pytest.raises(ValueError, match="switch is 1: it must be true or false"):
        node().run(1, 1)


BROKEN = {
    "tokens of another width": lambda f: f._replace(tokens=f.tokens[..., :8]),
    "too few tokens": lambda f: f._replace(tokens=f.tokens[:, :8]),
    "half precision": lambda f: f._replace(tokens=f.tokens.half()),
    "NaN": lambda f: f._replace(tokens=f.tokens * math.nan),
    "infinite latents": lambda f: f._replace(latents=f.latents * math.inf),
    "no values": lambda f: f._replace(latents=f.latents.to("meta")),
    "another grid": lambda f: f._replace(grid=(2, 8)),
    "no grid": lambda f: f._replace(grid=None),
    "no tokenizer": lambda f: f._replace(tokenizer=None),
    "a negative depth": lambda f: f._replace(depth=-1),
    "an endless depth": lambda f: f._replace(depth=2**70),
    "no pictures": lambda f: f._replace(tokens=f.tokens[:0], latents=f.latents[:0]),
    "a plain tuple": lambda f: tuple(f),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_features_whose_fields_do_not_belong_together_are_refused_everywhere(values, broken):
    features: Features = broken(values["MING_FEATURES"])
    for node_id, words in (("MingTokDecode", {}), ("MingEdit", {"instruction": "Blue."})):
        with pytest.raises(ValueError, match=r"features"):
            run(node_id, values, features=features, **words)


# --- Pictures -----------------------------------------------------------------------------------------------------

WHOLE = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16]
NO_PICTURES = {
    **{str(dtype): lambda t, dtype=dtype: (t * 255).to(dtype) for dtype in WHOLE},
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "no channel": lambda t: t[..., :0],
    "no pixel": lambda t: t[:, :0],
    "no picture": lambda t: t[:0],
    "two channels": lambda t: t[..., :2],
    "five channels": lambda t: torch.cat([t, t[..., :2]], -1),
    "no batch": lambda t: t[0],
    "channels first": lambda t: t.permute(0, 3, 1, 2),
    "NaN": lambda t: t.where(t < 0.9, math.nan),
    "infinite": lambda t: t.where(t < 0.9, math.inf),
}


@pytest.mark.parametrize("spoil", NO_PICTURES.values(), ids=NO_PICTURES)
def test_a_tensor_that_is_no_picture_is_refused_in_words_and_never_guessed(values, spoil):
    image = spoil(torch.rand(1, 40, SIDE, 3, generator=torch.Generator().manual_seed(1)))
    for node_id, inputs in (
        ("MingTokEncode", {"image": image}),
        ("MingImageMetrics", {"image_a": image, "image_b": image}),
        ("MingImageMetrics", {"image_a": values["IMAGE"], "image_b": image}),
    ):
        with pytest.raises(ValueError, match=r"image.*: (convert|connect|compute|make|repair|resize)"):
            run(node_id, values, **inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_pictures_of_other_floats_and_of_bools_are_taken(values, dtype):
    image = torch.rand(1, SIDE, SIDE, 3).round().to(dtype)
    latent, _ = run("MingTokEncode", values, image=image)
    same, _ = run("MingTokEncode", values, image=image.float())
    assert torch.equal(latent["samples"], same["samples"])


@pytest.mark.parametrize("spoil", ["torch.uint8", "torch.complex64", "torch.float8_e5m2", "sparse", "meta", "NaN"])
def test_a_tensor_that_is_no_mask_is_refused_in_words(values, spoil):
    mask = NO_PICTURES[spoil](torch.rand(1, SIDE, SIDE))
    features = values["MING_FEATURES"]
    for node_id, inputs in (("MingTokEncode", {}), ("MingEdit", {"features": features, "instruction": "Blue."})):
        with pytest.raises(ValueError, match="mask"):
            run(node_id, values, mask=mask, **inputs)


@pytest.mark.parametrize("spoil", ["torch.uint8", "torch.complex64", "torch.float8_e5m2", "sparse", "meta", "NaN"])
def test_a_tensor_that_is_no_latent_is_refused_in_words(values, spoil):
    samples = NO_PICTURES[spoil](torch.rand(values["MING_FEATURES"].latents.shape))
    with pytest.raises(ValueError, match=r"LATENT|latents"):
        run("MingTokSemanticFeatures", values, latent={"samples": samples})


@pytest.mark.parametrize("depth", [-1, 2**70, "x", None, 1.5, True, []])
def test_a_latent_whose_depth_is_none_is_refused(values, depth):
    with pytest.raises(ValueError, match="ming_depth of this LATENT is"):
        run("MingTokSemanticFeatures", values, latent=values["LATENT"] | {"ming_depth": depth})


def test_a_measure_is_never_nan(values):
    huge = torch.full((1, SIDE, SIDE, 3), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match="too large to be compared"):
        run("MingImageMetrics", values, image_a=huge, image_b=huge / 2)


# --- An error stands where its cause is ---------------------------------------------------------------------------


def test_an_edit_of_no_picture_names_the_input_and_computes_nothing(values):
    values["MING_UNIVISION"].model.network = None  # whatever touched the model would fail in other words
    for conversation in (None, Conversation()):
        with pytest.raises(ValueError, match=r"^features: there is no picture to edit; connect .* Generate"):
            run("MingEdit", values, instruction="Blue.", conversation=conversation)


def test_an_empty_instruction_is_an_error_of_that_input_alone():
    validate = NODE_CLASS_MAPPINGS["MingEdit"].VALIDATE_INPUTS
    assert list(inspect.signature(validate).parameters) == ["instruction"]  # ComfyUI shows the error on each of them
    assert "empty" in validate(instruction=" ")


@pytest.mark.parametrize("node_id", NODE_CLASS_MAPPINGS)
def test_what_a_node_validates_is_one_input_so_that_its_error_stands_on_that_one(node_id):
    validate = getattr(NODE_CLASS_MAPPINGS[node_id], "VALIDATE_INPUTS", None)
    assert validate is None or len(inspect.signature(validate).parameters) == 1


# --- What a node checks itself ------------------------------------------------------------------------------------


def checked_by_nodes():
    for node_id, node in NODE_CLASS_MAPPINGS.items():
        if hasattr(node, "VALIDATE_INPUTS"):
            for name in inspect.signature(node.VALIDATE_INPUTS).parameters:
                yield node_id, name


@pytest.mark.parametrize(("node_id", "name"), list(checked_by_nodes()))
@pytest.mark.parametrize(
    "value",
    [5, -1.5, math.nan, True, b"x", [], {}, (1,), object(), np.zeros(2), torch.zeros(2), "\0", "\ud800", "x" * 5000],
)
def test_what_a_node_checks_itself_gets_a_short_verdict_whatever_it_is(node_id, name, value):
    verdict = NODE_CLASS_MAPPINGS[node_id].VALIDATE_INPUTS(**{name: value})
    if name in ("prompt", "instruction", "scene") and verdict is True:  # its type is checked when the node runs
        return
    assert isinstance(verdict, str) and 0 < len(verdict) < 1500 and verdict.encode()


def test_a_bad_name_of_a_conversation_to_continue_is_called_as_its_widget_is():
    verdict = NODE_CLASS_MAPPINGS["MingContinueConversation"].VALIDATE_INPUTS(name="../x")
    assert verdict.startswith("name '../x' leads out of")
