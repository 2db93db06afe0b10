"""Several threads on one model: each gets what it would get alone, whatever the others do."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from ming_univision.ming_core import Conversation, Solver, load_univision
from ming_univision.ming_core.quantization import kernels, layers
from ming_univision.nodes.host import PACK
from ming_univision.tests.kernels import int4_kernel

THREADS = 6
PRECISIONS = {"fp32": {}, "int4": {"dtype": torch.bfloat16, "quantization": "int4"}}


def load(precision: str):
    return load_univision(PACK / "models" / "tiny-shapes", **PRECISIONS[precision])


def answer(engine, number: int):
    return engine.understand(Conversation(), f"Hello number {number}!", max_new_tokens=3, return_logits=True).logits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_threads_that_use_a_fresh_model_at_once_get_what_each_gets_alone(precision):
    alone = [answer(load(precision), number) for number in range(2)]
    engine, start = load(precision), Barrier(THREADS)
    engine.prefix_cache.limit = 0  # else a round may find what another thread has prefilled in other pieces

    def run(number: int):
        start.wait()
        if number >= 4:  # the tokenizer of the model computes beside it
            with torch.no_grad():
                pixels = torch.zeros(1, 3, 128, 128)
                return engine.mingtok.decode(engine.mingtok.semantic_features(engine.mingtok.encode(pixels)))
        return answer(engine, number % 2)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, range(THREADS)))
    for number in range(4):
        assert torch.equal(found[number], alone[number % 2])
    assert torch.equal(found[4], found[5])


# --- the first use of a quantized model, which packs its weights for a kernel -------------------------------------

FAILURES = {"interrupt": KeyboardInterrupt(), "no memory": torch.cuda.OutOfMemoryError("CUDA out of memory")}
ON_THE_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


@pytest.fixture
def fail(monkeypatch):
    """fail(module, name, at, error): that call of a function, counted from 1, raises; returns the list of calls."""

    def put(module, name, at, error):
        function, calls = getattr(module, name), []

        def failing(*args, **kwargs):
            calls.append(name)
            if len(calls) == at:
                raise error
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, failing)
        return calls

    return put


@int4_kernel
@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize(
    ("module", "name", "at"),
    [(layers, "pack", 1), (layers, "pack", 7), (layers, "quantized_product", 1), (layers, "quantized_product", 20)],
)
def test_a_failure_in_the_first_use_of_a_quantized_model_leaves_it_usable(fail, module, name, at, error):
    expected, engine = answer(load("int4"), 1), load("int4")
    stored = {key: value.clone() for key, value in engine.network.state_dict().items()}
    calls = fail(module, name, at, FAILURES[error])
    with pytest.raises(type(FAILURES[error])):
        answer(engine, 1)
    assert len(calls) == at
    assert torch.equal(answer(engine, 1), expected)
    assert all(torch.equal(value, stored[key]) for key, value in engine.network.state_dict().items())


@int4_kernel
@pytest.mark.parametrize("error", [*FAILURES.values(), ON_THE_CPU], ids=["interrupt", "no memory", "no RAM"])
def test_a_failure_while_a_kernel_is_tried_is_not_taken_for_its_answer(fail, error):
    kernels.kernel_works.cache_clear()
    fail(kernels, "pack", 1, error)
    with pytest.raises(type(error)):
        kernels.kernel_works("int4", torch.device("cpu"), torch.bfloat16)
    assert kernels.kernel_works("int4", torch.device("cpu"), torch.bfloat16)


def arrange_until(layer, line: int) -> bool:
    """Bring a layer's values into the CPU's order, with Ctrl+C before a line; False: there are not so many lines."""
    reached = 0

    def interrupt(frame, event, _):
        nonlocal reached
        if event == "line" and frame.f_code.co_name in ("arrange", "__setattr__", "register_parameter"):
            reached += 1
            if reached == line:
                raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        layer.arrange("cpu")
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)


@int4_kernel
def test_an_interrupt_at_any_line_leaves_values_and_their_order_together():
    layer = next(m for m in load("int4").network.modules() if isinstance(m, layers.QuantizedLinear))
    before, line = layer.values.clone(), 1
    while arrange_until(layer, line):
        layer.arrange(layers.PLAIN)
        assert torch.equal(layer.values, before)
        line += 1
    assert line > 3 and layer.order == "cpu"


@int4_kernel
@pytest.mark.parametrize("error", FAILURES)
def test_of_threads_that_use_a_fresh_model_only_the_one_that_fails_gets_an_error(fail, error):
    expected, engine, start = answer(load("int4"), 1), load("int4"), Barrier(THREADS)
    engine.prefix_cache.limit = 0
    fail(layers, "pack", 5, FAILURES[error])

    def run(_):
        start.wait()
        try:
            return answer(engine, 1)
        except (KeyboardInterrupt, RuntimeError) as failure:
            return failure

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, range(THREADS)))
    failed = [result for result in found if not isinstance(result, torch.Tensor)]
    assert failed == [FAILURES[error]]
    assert all(torch.equal(result, expected) for result in found if isinstance(result, torch.Tensor))


def test_an_interrupt_lets_the_lock_go_and_a_copy_has_its_own(model):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate_image(Conversation(), "A cat.", solver=Solver(1), on_token=stop)
    with ThreadPoolExecutor(1) as pool:  # another thread: the same one could take its own lock again
        assert pool.submit(answer, model, 1).result(timeout=60) is not None
    assert copy.deepcopy(model.mingtok).lock is not model.mingtok.lock
