"""Many drawing rounds in one pass over the weights, each with a past of its own: an examination asks for hundreds.

`UniVision.generate_images` draws several pictures of one prompt. Here the pasts stand one behind the other in one
prefix, of which each row sees its own, from position 0 on: the same mathematics, and the same noise, as one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from ming_core.decoding import Guided, Turn, draw_latents, drawn_features, seeded_noise
from torch import Tensor

from ming_core.conversation import Conversation, Picture, guidance_masks
from ming_core.features import Features
from ming_core.flow_head import Guidance, Solver
from ming_core.language_model import Rows
from ming_core.rounds import OpenRound, answer_segments, close_round, open_round, plan_round
from ming_core.univision import UniVision

AT_ONCE = 16  # pictures: more cost memory and gain little


@dataclass(frozen=True)
class Wish:
    """A round that is to draw one picture; what is left out is as in `UniVision.generate_image`."""

    prompt: str
    seed: int = 0
    conversation: Conversation = field(default_factory=Conversation)
    features: Features | None = None
    noise: Tensor | None = None


def draw_many(model: UniVision, wishes: Sequence[Wish], solver: Solver | None = None) -> list[Turn]:
    """What `generate_image` gives for each wish, with its default settings. Errors are the same."""
    opened: dict[int, tuple[OpenRound, Tensor]] = {}
    done: dict[int, Turn] = {}
    with torch.no_grad():
        for i in range(len(wishes)):
            opened[i] = _open(model, wishes[i])
            alike = [k for k, (_, views) in opened.items() if len(views) == len(opened[i][1])]
            if len(alike) == AT_ONCE:
                done |= _draw(model, wishes, {k: opened.pop(k) for k in alike}, solver)
        for rows in {len(views) for _, views in opened.values()}:
            alike = {k: found for k, found in opened.items() if len(found[1]) == rows}
            done |= _draw(model, wishes, alike, solver)
    return [done[i] for i in range(len(wishes))]


def _open(model: UniVision, wish: Wish) -> tuple[OpenRound, Tensor]:
    """The round, its prompt prefilled, and what its guidance rows see."""
    opened = open_round(model, plan_round(model, wish.conversation, wish.prompt, wish.features, 1, drawing=True))
    return opened, guidance_masks(opened.conversation.parts)


def _draw(
    model: UniVision, wishes: Sequence[Wish], batch: dict[int, tuple[OpenRound, Tensor]], solver: Solver | None
) -> dict[int, Turn]:
    """Rounds with equally many views, all at once."""
    language_model, llm = model.language_model, model.config.llm_config
    rounds = [opened for opened, _ in batch.values()]
    guided = Guided.by(Guidance(), len(next(iter(batch.values()))[1]))
    noise = [seeded_noise(model, [wishes[i].seed], _one(wishes[i].noise), batch[i][0].conversation) for i in batch]

    prefix = language_model.prefix(sum(opened.prefix.length for opened in rounds))
    visible = torch.zeros(len(batch) * guided.rows, prefix.keys.shape[2], dtype=torch.bool)
    for k, (opened, views) in enumerate(batch.values()):
        own = slice(prefix.length, prefix.length + opened.prefix.length)
        visible[k * guided.rows : (k + 1) * guided.rows, own] = views[guided.used]
        prefix.extend(opened.prefix.slice(0, opened.prefix.length))
    rows = Rows(prefix, llm.num_image_tokens_for_gen + 1, len(visible), visible)
    latents, tokens, x = draw_latents(model, rows, guided, torch.cat(noise), solver or Solver())
    logits = language_model.logits(language_model.step(x, rows)[:: guided.rows])
    logits[:, llm.image_start_token] = float("-inf")

    turns = {}
    for k, (i, next_id) in enumerate(zip(batch, logits.argmax(-1).tolist(), strict=True)):
        if next_id != llm.eos_token_id:  # it has something to say: that is written one by one
            turns[i] = _alone(model, wishes[i], solver)
            continue
        picture = drawn_features(model, latents[k : k + 1], tokens[k : k + 1], rounds[k].conversation.depth)[0]
        segments = [*answer_segments(model, [llm.image_start_token]), Picture(picture, drawn=True)]
        grown = close_round(model, rounds[k], segments, rows, k * guided.rows)
        turns[i] = Turn("", [llm.image_start_token, next_id], picture, grown, rounds[k].prefilled)
    return turns


def _alone(model: UniVision, wish: Wish, solver: Solver | None) -> Turn:
    return model.generate_image(
        wish.conversation, wish.prompt, seed=wish.seed, features=wish.features, noise=wish.noise, solver=solver
    )


def _one(noise: Tensor | None) -> Tensor | None:
    return None if noise is None else noise[None]
