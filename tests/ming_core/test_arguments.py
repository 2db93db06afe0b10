"""What callers of the library pass: numbers of any library are taken as they are, everything else is named."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ming_univision.ming_core import (
    Conversation,
    DrawRequest,
    Guidance,
    ImageOptions,
    Sampling,
    Solver,
    TextOptions,
)
from ming_univision.ming_core.checks import check_tensor, real_number, whole_number
from ming_univision.ming_core.images import psnr, ssim, to_pixels

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.integers(-128, 127).map(np.int8),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.floats(width=32).map(np.float32),
    st.integers(-(2**63), 2**63 - 1).map(torch.tensor),
    st.floats(width=32).map(torch.tensor),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(SCALARS, st.integers(-5, 5), st.integers(5, 2**40))
def test_any_value_is_a_plain_number_in_the_range_or_an_error_that_names_it(value, low, high):
    for check, kind in ((whole_number, int), (real_number, float)):
        try:
            found = check("steps", value, low, high)
        except ValueError as error:
            assert str(error).startswith("steps is ") and "it must be" in str(error)
        else:
            assert type(found) is kind and low <= found <= high and found == value


def test_a_number_too_long_to_be_written_is_refused_all_the_same():
    for check in (whole_number, real_number):
        with pytest.raises(ValueError, match="steps is a number of 33220 bits: it must be from 1 to 9"):
            check("steps", 10**10_000, 1, 9)
    with pytest.raises(ValueError, match="finite"):
        real_number("temperature", 10**10_000, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampling(temperature=math.nan), "sampling.temperature is nan: it must be a number"),
        (lambda: Sampling(temperature="hot"), "sampling.temperature is 'hot': it must be a number of at least 0"),
        (lambda: Sampling(temperature=-1), "sampling.temperature is -1: it must be at least 0"),
        (lambda: Sampling(top_p=0), "sampling.top_p is 0: it must be above 0"),
        (lambda: Sampling(top_p=1.5), "sampling.top_p is 1.5: it must be from 0 to 1"),
        (lambda: Guidance(text=math.inf), "guidance.text is inf: it must be a finite number"),
        (lambda: Guidance(image=None), r"guidance.image is nothing \(None\)"),
        (lambda: Solver(0), "solver steps is 0: it must be from 1 to"),
        (lambda: Solver(10**10), "solver steps is 10000000000: it must be from 1 to"),
        (lambda: Solver(2.5), "solver steps is 2.5: it must be a whole number"),
        (lambda: Solver(method=["euler"]), "solver method .* is unknown"),
        (lambda: Solver(time_shift=math.nan), "solver time_shift is nan"),
        (lambda: Solver(time_shift=0), "solver time_shift is 0: it must be above 0"),
        (lambda: TextOptions(max_new_tokens=0), "max_new_tokens is 0: it must be at least 1"),
        (lambda: TextOptions(max_new_tokens=True), "max_new_tokens is True: it must be a whole number"),
        (lambda: TextOptions(seed=1.5), "seed is 1.5: it must be a whole number"),
        (lambda: TextOptions(sampling=0.7), "sampling is 0.7: it must be a Sampling"),
        (lambda: ImageOptions(seeds=5), "seeds is 5: give a list"),
        (lambda: ImageOptions(seeds=()), "seeds is empty"),
        (lambda: ImageOptions(seeds=(1, "2")), "a seed is '2'"),
        (lambda: ImageOptions(guidance=3.0), "guidance is 3.0: it must be a Guidance"),
        (lambda: ImageOptions(solver="euler"), "solver is 'euler': it must be a Solver"),
        (lambda: ImageOptions(start="now"), "start is 'now': choose one of"),
        (lambda: ImageOptions(noise=[1.0]), "noise is a list: it must be a tensor"),
        (lambda: ImageOptions(mask=np.ones((4, 4))), "mask is a NumPy array"),
        (lambda: ImageOptions(mask=torch.ones(4, 4, dtype=torch.int64)), "mask holds int64"),
        (lambda: DrawRequest("A cat.", seed=None), "seed is nothing"),
    ],
)
def test_a_wrong_option_is_refused_by_name_when_it_is_given(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_numbers_of_numpy_and_torch_are_plain_ones_in_the_options():
    options = ImageOptions([np.uint64(2**63 + 1), torch.tensor(2)], Guidance(np.float32(2), 1), Solver(np.int64(4)))
    assert options.seeds == (2**63 + 1, 2) and all(type(seed) is int for seed in options.seeds)
    assert type(options.guidance.text) is float and type(options.solver.steps) is int
    assert TextOptions(seed=np.int32(3), max_new_tokens=4.0) == TextOptions(seed=3, max_new_tokens=4)


def test_a_seed_of_numpy_draws_what_the_same_number_does(model):
    short = {"solver": Solver(2), "max_new_tokens": 2}
    plain = model.generate_image(Conversation(), "A cat.", seed=2**63 + 1, **short).features
    model.prefix_cache.clear()
    assert model.generate_image(Conversation(), "A cat.", seed=np.uint64(2**63 + 1), **short).features == plain


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, "Hello."), r"conversation is nothing \(None\): it must be a Conversation"),
        ((Conversation(), None), r"prompt is nothing \(None\): it must be text"),
        ((Conversation(), b"Hello."), "prompt is b'Hello.': it must be text"),
        ((Conversation(), " "), "the prompt is empty"),
    ],
)
def test_a_round_of_wrong_types_is_refused_before_anything_is_computed(model, arguments, words):
    model.network = None  # whatever touched the weights would fail in other words
    for call in (model.understand, model.generate_image):
        with pytest.raises(ValueError, match=words):
            call(*arguments)


def test_features_of_another_type_are_named(model, picture):
    for value in (picture.latents, tuple(picture), "picture"):
        with pytest.raises(ValueError, match=r"features is .* it must be Features"):
            model.understand(Conversation(), "What is it?", features=value)


@pytest.mark.parametrize("call", [lambda t: to_pixels(t, 32), lambda t: psnr(t, t), lambda t: ssim(t, t)])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: (t * 255).to(torch.uint8), "holds uint8: convert it to float32 with values from 0 to 1"),
        (lambda t: t.to(torch.complex64), "holds complex64: convert it"),
        (lambda t: t.to(torch.float8_e5m2), "holds float8_e5m2: convert it"),
        (lambda t: t.to_sparse(), "is a sparse or nested tensor: make it dense"),
        (lambda t: t.to("meta"), "is on the meta device"),
        (lambda t: t / 0, "contains NaN or infinite values"),
        (lambda t: t[:0], "there is no"),
    ],
)
def test_a_tensor_that_is_no_picture_is_refused_in_words(call, spoil, words):
    with pytest.raises(ValueError, match=words):
        call(spoil(torch.rand(1, 32, 32, 3) + 0.1))


def test_a_tensor_that_is_fine_is_given_back_as_it_is():
    tensor = torch.rand(2, 3)
    assert check_tensor("noise", tensor) is tensor
