"""Ming-UniVision: the parts put together.

    pixels -> MingTok -> semantic features -> linear_proj -> language model -> text
                              ^                                   |
                              +---- semantic decoder <- flow head-+   (a latent, 64 or 256 times a picture)

What is seen and what is drawn enter the language model as the same features, so a picture it has drawn is in its
view without ever having been pixels. The loops that draw and write are in decoding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import decoding
from .config import MingTokConfig, UniVisionConfig
from .conversation import Conversation
from .decoding import Sampling, Turn
from .features import Features
from .flow_head import FlowHead, Guidance, Solver
from .language_model import LanguageModel
from .mingtok import MingTok
from .placement import Placed
from .prefix_cache import PrefixCache
from .prompts import ChatFormat
from .rounds import Progress, drawn_tokens, plan_round


class UniVision(Placed):
    """One autoregressive model that looks at, draws and edits pictures.

    `chat` may be None for a model that is only trained or measured. `flow_hidden`: inner width of the flow head's
    layers where it is not the usual one. `fingerprint` identifies the weights; the loader sets it. Keys and values of
    what was said are kept in `prefix_cache`; `prefix_cache.clear()` frees them.
    """

    def __init__(
        self,
        config: UniVisionConfig | None = None,
        chat: ChatFormat | None = None,
        *,
        flow_hidden: int | None = None,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or UniVisionConfig()
        mingtok = config.mingtok_config or MingTokConfig()
        llm, flow = config.llm_config, config.vishead_diffloss_config
        make = {"operations": operations, "device": device, "dtype": dtype}
        self.mingtok = MingTok(mingtok, **make)
        self.linear_proj = _projection(mingtok.semantic_decoder.embed_dim, llm.hidden_size, config.mlp_depth, **make)
        self.language_model = LanguageModel(llm, **make)
        self.flow_head = FlowHead(
            llm.hidden_size, mingtok.semantic_decoder.in_dim, flow.diffloss_w, flow.diffloss_d, flow_hidden, **make
        )
        self.chat = chat
        self.fingerprint = ""
        self.quantization: str | None = None  # set by quantization.quantize
        self.prefix_cache = PrefixCache()

    @property
    def witness(self) -> Tensor:
        return self.language_model.witness

    def project(self, tokens: Tensor) -> Tensor:
        """Semantic features [..., D] -> the language model's embeddings [..., H]."""
        return self.linear_proj(tokens.to(self.device, self.dtype))

    def working_memory(
        self, conversation: Conversation, prompt: str, features: Features | None, max_new_tokens: int, pictures: int = 0
    ) -> int:
        """Bytes that a round takes beside the weights, at most; `pictures` that it draws.

        Raises what the round itself would raise before it computes anything: so a round that cannot be is refused
        before memory is made for it.
        """
        planned = plan_round(self, conversation, prompt, features, max_new_tokens, drawing=pictures > 0)
        prefix = planned.length
        if not pictures:
            return self.language_model.working_memory(prefix, 1, max_new_tokens)
        # three guidance rows a picture, and the row of those that goes on to the text after it
        new = 2 * max_new_tokens + drawn_tokens(self)
        drawing = self.language_model.working_memory(prefix, 4 * pictures, new)
        return drawing + self.mingtok.working_memory(pictures, self.config.llm_config.num_image_tokens_for_gen)

    def understand(
        self,
        conversation: Conversation,
        prompt: str,
        *,
        features: Features | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
        on_token: Callable[[Progress], None] | None = None,
        return_logits: bool = False,
    ) -> Turn:
        """One round that answers in text.

        conversation   what was said so far; `Conversation()` for the first round
        features       pictures to attach to the prompt; those in view already are not attached again
        sampling       greedy unless its temperature is above 0, then drawn with `seed`
        on_token       called after every token and between parts of a long prompt; raise from it to stop, which loses
                       nothing but this round
        return_logits  keep a row of logits for every emitted token

        Raises ValueError for a blank prompt, pictures or a conversation of another model, or a transcript that would
        outgrow the model's positions; RuntimeError where fp16 is too narrow for the model.
        """
        return decoding.understand(
            self,
            conversation,
            prompt,
            features=features,
            max_new_tokens=max_new_tokens,
            sampling=sampling or Sampling(),
            seed=seed,
            on_token=on_token,
            return_logits=return_logits,
        )

    def generate_image(
        self, conversation: Conversation, prompt: str, *, seed: int = 0, noise: Tensor | None = None, **options: Any
    ) -> Turn:
        """One round that draws one picture: `generate_images` with one seed, and noise float32 [tokens, C]."""
        noises = None if noise is None else noise[None]
        return self.generate_images(conversation, prompt, seeds=[seed], noise=noises, **options)[0]

    def generate_images(
        self,
        conversation: Conversation,
        prompt: str,
        *,
        seeds: Sequence[int],
        features: Features | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        start: str = "draw now",
        max_new_tokens: int = 64,
        noise: Tensor | None = None,
        on_token: Callable[[Progress], None] | None = None,
        return_logits: bool = False,
    ) -> list[Turn]:
        """One round that draws, a picture a seed, all in one pass over the weights: one Turn a seed.

        On a conversation without a picture in view this is text to image, else an edit.

        guidance        defaults to text 3.0, image 1.1 as published
        solver          defaults to Euler with the checkpoint's number of steps
        temperature     the noise is multiplied by it
        start           "draw now": begin the picture at once; "model decides": write until the model itself begins it
        max_new_tokens  of text, before and after the picture together
        noise           float32 [seeds, tokens, C] in the place of the seeded one (one more row a picture is ignored)
        The others are as in `understand`, and so are the errors; RuntimeError when the model decides not to draw.
        """
        return decoding.draw(
            self,
            conversation,
            prompt,
            seeds=list(seeds),
            features=features,
            guidance=guidance or Guidance(),
            solver=solver or Solver(),
            temperature=temperature,
            start=start,
            max_new_tokens=max_new_tokens,
            noise=noise,
            on_token=on_token,
            return_logits=return_logits,
        )


def _projection(width: int, hidden: int, depth: int, *, operations: Any, device: Any, dtype: Any) -> nn.Sequential:
    """`depth` linear layers with (exact) GELU between them."""
    layers: list[nn.Module] = [operations.Linear(width, hidden, device=device, dtype=dtype)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), operations.Linear(hidden, hidden, device=device, dtype=dtype)]
    return nn.Sequential(*layers)
