"""Ming-UniVision: the network, put together from its parts.

    pixels -> MingTok -> semantic features -> linear_proj -> language model -> text
                              ^                                   |
                              +---- semantic decoder <- flow head-+   (a latent, 64 or 256 times an image)

What is seen and what is drawn enter the language model as the same features, so an image that it has drawn is in its
view without ever having been pixels. The loops that draw and write are in the engine (engine.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import CausalAttention
from .config import MingTokConfig, UniVisionConfig
from .flow_head import FlowHead
from .language_model import LanguageModel
from .mingtok import MingTok
from .offload import OffloadableModule


class UniVisionOutput(NamedTuple):
    """What the network predicts at every position of a sequence.

    logits      float32 [B, T, vocabulary], for the next token where it is text
    conditions  [B, T, w], for the flow head where the next token is an image token
    """

    logits: Tensor
    conditions: Tensor


class UniVision(OffloadableModule):
    """The weights of one autoregressive model that looks at, draws and edits images.

    `flow_hidden`: inner width of the flow head's layers where it is not the usual one. `quantization`: the format of
    quantized weights; set by quantization.quantize.
    """

    def __init__(
        self,
        config: UniVisionConfig | None = None,
        *,
        flow_hidden: int | None = None,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or UniVisionConfig()
        # a checkpoint that does not say what tokenizer it has is taken to have the published one
        mingtok = config.mingtok_config or MingTokConfig()
        llm, flow = config.llm_config, config.vishead_diffloss_config
        make: dict[str, Any] = {"operations": operations, "device": device, "dtype": dtype}
        # published: 0.70 B weights, of which a drawing runs the 0.30 B of the semantic decoder
        self.mingtok = MingTok(mingtok, **make)
        # 6.3 M weights, and the only way for an image into the language model
        self.linear_proj = _projection(mingtok.semantic_decoder.embed_dim, llm.hidden_size, config.mlp_depth, **make)
        # 16.8 B weights, of which a token passes 2.2 B: 6 of 64 experts in every layer
        self.language_model = LanguageModel(llm, **make)
        # 1.3 B weights, most of them read in each of 16 steps: four fifths of the bytes of a drawn token
        self.flow_head = FlowHead(
            llm.hidden_size, mingtok.semantic_decoder.in_dim, flow.diffloss_w, flow.diffloss_d, flow_hidden, **make
        )
        self.quantization: str | None = None

    @property
    def reference_weight(self) -> Tensor:
        return self.language_model.reference_weight

    @property
    def read_by_a_token(self) -> tuple[nn.Module, ...]:
        """All whose weights are read for an image token that is drawn."""
        # all of the language model but its word embedding, which a host may leave offloaded
        decoder = self.language_model.model
        return decoder.layers, decoder.norm, self.flow_head, self.mingtok.semantic_decoder, self.linear_proj

    def project(self, tokens: Tensor) -> Tensor:
        """Semantic features [..., D] -> the language model's embeddings [..., H]."""
        # features that have travelled are float32 and in host memory
        return self.linear_proj(tokens.to(self.device, self.dtype))

    def forward(
        self, ids: Tensor, features: Tensor, at: Tensor, seen: Tensor, mask: Tensor | None = None
    ) -> UniVisionOutput:
        """The figure of the paper, over whole sequences: text and image tokens in, predictions for both out.

        ids       int64 [B, T], token ids; those at image positions do not count
        features  [B, T, D], semantic features; those at text positions do not count
        at        bool [B, T], True at image positions
        seen      bool [B, T], True at positions of images that were looked at rather than drawn: the image router's
        mask      bool [B, T, T], True where a position may attend; None: causal
        """
        # words and features side by side in one sequence, in the order in which they were said and drawn
        x = torch.where(at[..., None], self.project(features), self.language_model.embed(ids))  # (B, T, H)
        # an image has no rows and columns here: its tokens are counted like words, one after the other
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        # one stack of layers for both; only the routers of the experts tell them apart
        hidden = self.language_model.model(x, positions, CausalAttention(mask), seen)  # (B, T, H), final-normed
        # Both at every position: which of the two counts depends on the next token, and the loss knows it. The velocity
        # net is not run, since it needs a noisy latent and a time besides.
        return UniVisionOutput(self.language_model.logits(hidden), self.flow_head.vis_head(hidden))


def _projection(width: int, hidden: int, depth: int, *, operations: Any, device: Any, dtype: Any) -> nn.Sequential:
    """`depth` linear layers with (exact) GELU between them."""
    # GELUs count in the published names: linear_proj.0 and linear_proj.2 have the weights
    layers: list[nn.Module] = [operations.Linear(width, hidden, device=device, dtype=dtype)]
    for _ in range(depth - 1):
        # (erf): tanh would be off by 3.6e-4 here, which hardly shows in the output of a whole model
        layers += [nn.GELU(), operations.Linear(hidden, hidden, device=device, dtype=dtype)]
    return nn.Sequential(*layers)
