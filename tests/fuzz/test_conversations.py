"""Random sequences of rounds: none changes what was said before, and what is saved comes back."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from ming_univision.ming_core import (
    Conversation,
    Engine,
    Features,
    Guidance,
    RoundResult,
    Sampling,
    Solver,
    load_conversation,
    save_conversation,
)
from ming_univision.tests.fuzz.hostile import TEXTS, examples, is_for_people

words = st.sampled_from(("A cat.", "What is it?", "Make it blue.", *TEXTS)) | st.text(max_size=20)
seeds = st.integers(0, 2**64 - 1)


class Stop(Exception):
    """What an interrupted round is stopped with."""


class Rounds(RuleBasedStateMachine):
    """Rounds of a model on any conversation that was had, each of which must stay what it was."""

    engine: Engine
    pictures: list[Features]
    file: Path

    talks = Bundle("talks")

    @initialize(target=talks, limit=st.sampled_from((0, 100_000, 1 << 30)))
    def begin(self, limit: int) -> Conversation:
        self.engine.prefix_cache.clear()
        self.engine.prefix_cache.limit = limit
        self.known: list[tuple[Conversation, bytes]] = []
        self.random_state = torch.get_rng_state()
        return Conversation()

    def kept(self, before: Conversation, result: RoundResult) -> Conversation:
        after = result.conversation
        assert after.parts[: len(before.parts)] == before.parts
        for image in after.images:
            assert torch.isfinite(image.features.latents).all() and torch.isfinite(image.features.tokens).all()
        self.known.append((after, after.digest()))
        return after

    @rule(target=talks, talk=talks, prompt=words, seed=seeds, shown=st.integers(-1, 2), warm=st.booleans())
    def understand(self, talk: Conversation, prompt: str, seed: int, shown: int, warm: bool) -> Conversation:
        features = None if shown < 0 else self.pictures[shown]
        chosen = {"max_new_tokens": 3, "sampling": Sampling(0.7, 0.5) if warm else None}
        try:
            said = self.engine.understand(talk, prompt, features=features, seed=seed, **chosen)
        except ValueError as error:
            assert is_for_people(str(error))
            return multiple()
        return self.kept(talk, said)

    @rule(target=talks, talk=talks, prompt=words, seed=seeds, shown=st.integers(-1, 2), batch=st.integers(1, 2))
    def draw(self, talk: Conversation, prompt: str, seed: int, shown: int, batch: int) -> Conversation:
        features = None if shown < 0 else self.pictures[shown]
        chosen = {"solver": Solver(2), "guidance": Guidance(3.0, 1.1), "max_new_tokens": 2}
        try:
            drawn = self.engine.generate_images(talk, prompt, seeds=[seed, 7][:batch], features=features, **chosen)
        except ValueError as error:
            assert is_for_people(str(error))
            return multiple()
        return multiple(*(self.kept(talk, result) for result in drawn))

    @rule(talk=talks, after=st.integers(0, 20))
    def interrupt(self, talk: Conversation, after: int) -> None:
        left = after

        def stop(_: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stop

        try:
            self.engine.generate_image(talk, "A cat.", solver=Solver(2), max_new_tokens=2, on_token=stop)
        except (Stop, ValueError) as error:
            assert isinstance(error, Stop) or is_for_people(str(error))

    @rule(target=talks, talk=talks)
    def save_and_load(self, talk: Conversation) -> Conversation:
        save_conversation(talk, self.file)
        loaded = load_conversation(self.file, self.engine)
        assert loaded == talk and loaded.transcript() == talk.transcript() and loaded.depth == talk.depth
        return loaded

    @invariant()
    def nothing_that_was_said_has_changed(self) -> None:
        assert all(talk.digest() == digest for talk, digest in getattr(self, "known", ()))

    @invariant()
    def the_cache_is_within_its_limit(self) -> None:
        cache = self.engine.prefix_cache
        assert cache.bytes <= cache.limit or not hasattr(self, "known")

    @invariant()
    def the_global_random_state_is_untouched(self) -> None:
        assert torch.equal(torch.get_rng_state(), getattr(self, "random_state", torch.get_rng_state()))


def test_rounds_in_any_order_change_nothing_that_was_said(engine, features, folder):
    Rounds.engine, Rounds.file = engine, folder / "talk.safetensors"
    Rounds.pictures = [*features.split(), features]
    run_state_machine_as_test(Rounds, settings=settings(examples(10), stateful_step_count=15))
