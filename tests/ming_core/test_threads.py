"""Several threads on one model: each gets what it would get alone, whatever the others do."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from ming_univision.ming_core import Conversation, Solver, load_univision
from ming_univision.nodes.host import PACK

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


def test_an_interrupt_lets_the_lock_go_and_a_copy_has_its_own(model):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate_image(Conversation(), "A cat.", solver=Solver(1), on_token=stop)
    with ThreadPoolExecutor(1) as pool:  # another thread: the same one could take its own lock again
        assert pool.submit(answer, model, 1).result(timeout=60) is not None
    assert copy.deepcopy(model.mingtok).lock is not model.mingtok.lock
