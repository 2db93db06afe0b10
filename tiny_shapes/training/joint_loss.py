"""What the models are asked to do, as losses.

MingTok: give pictures back from latents with noise on them (near latents must mean near pictures, for a flow head
draws them a little wrong), and expand latents to features from which a linear layer reads what each patch shows
(shape, colour, which part of the shape): in a procedural world these labels are the teacher that the published recipe
aligns features with. For some pictures a share of the latents is blotted out, and the labels must still be read.

Ming-UniVision, around a frozen MingTok: predict the next token of answers, and on image positions the velocity from
noise to the latent that comes next (rectified flow). The pictures it is to draw are fed with noise on their latents,
as its own drawings will have errors, which would otherwise add up over the tokens. The flow loss alone is a faint
teacher of what belongs where, so a throw-away linear layer also reads from the hidden state what the token to come
shows: the labels that MingTok's features were aligned with, and whether an edit changes it. Another one reads
things in prompts, all of a thing: where the words for it end, so that its colour does not go to another; and at the end
of a prompt about one thing, as "what color is the star?" wants a colour, but to find it is to know the star's size and
place as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_core.experts import MixtureOfExperts
from ming_core.features import to_tokens
from ming_core.flow_head import FinalLayer, FlowHead, ResBlock
from ming_core.images import from_uint8
from ming_core.language_model import Causal, RMSNorm
from ming_core.mingtok import MingTok
from ming_core.univision import UniVision

from ..world import LABEL_CLASSES
from .pictures import LABELS
from .sequences import ATTRIBUTES, IGNORE, SHOWN, Batch

BLOTTED = 0.3  # share of the latents that masked modelling blots out


@dataclass(frozen=True)
class TokenizerWeights:
    """Weights and strengths of the tokenizer's objective."""

    labels: float = 0.15
    size: float = 2e-3  # on the mean square of the raw latents: keeps them near 1
    noise: float = 0.5  # in standard deviations of the latents: drawn from 0 to this for each picture
    masked: float = 0.125  # share of the pictures used for masked modelling


class TokenizerLoss(nn.Module):
    """MingTok with the throw-away layer that reads labels from its features."""

    def __init__(self, mingtok: MingTok, weights: TokenizerWeights | None = None) -> None:
        super().__init__()
        self.mingtok, self.weights = mingtok, weights or TokenizerWeights()
        width = mingtok.config.semantic_decoder.embed_dim
        self.reader = nn.Linear(width, sum(LABEL_CLASSES[name] for name in LABELS))

    def forward(self, pixels: Tensor, labels: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """pixels [B, 3, H, W] in [-1, 1]; labels int64 [B, N], IGNORE where unknown. Returns "loss" and its parts."""
        tok, weights = self.mingtok, self.weights
        raw = tok.low_level_encoder(pixels)[:, :-1]  # (B, N, C)
        spread = torch.rand(len(raw), 1, 1, generator=generator).to(raw) * weights.noise * raw.detach().std()
        noisy = raw + spread * torch.randn(raw.shape, generator=generator).to(raw)
        masked = round(weights.masked * len(raw))
        keep = torch.rand(masked, raw.shape[1], 1, generator=generator).to(raw) >= BLOTTED
        semantic = tok.semantic_decoder(torch.cat([noisy[:masked] * keep, noisy[masked:]]))
        grid = (pixels.shape[2] // tok.patch_size, pixels.shape[3] // tok.patch_size)
        error = tok.assemble(tok.patches(semantic[masked:]), grid) - pixels[masked:]
        parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
        parts["labels"] = self.label_loss(semantic, labels)
        parts["size"] = raw.square().mean()
        parts["loss"] = parts["l1"] + parts["l2"] + weights.labels * parts["labels"] + weights.size * parts["size"]
        return parts

    def read(self, semantic: Tensor) -> dict[str, Tensor]:
        """Logits [B, N, classes] of each kind of label."""
        parts = self.reader(semantic).split([LABEL_CLASSES[name] for name in LABELS], dim=-1)
        return dict(zip(LABELS, parts, strict=True))

    def label_loss(self, semantic: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Summed over the kinds; each the mean over the patches whose label is known, 0 where none is."""
        total = semantic.new_zeros(())
        for name, logits in self.read(semantic).items():
            wanted = labels[name].flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORE, reduction="sum")
            total = total + losses / (wanted != IGNORE).sum().clamp_min(1)
        return total


@dataclass(frozen=True)
class JointWeights:
    """Weights and strengths of the joint objective."""

    text: float = 1.0
    flow: float = 1.0
    labels: float = 0.4
    meant: float = 0.4
    balance: float = 0.01
    noise: float = 0.4  # on the normalised latents of drawn pictures: drawn from 0 to this for each picture
    times: int = 2  # (time, noise) pairs a token: each costs about as much as the token in the language model


class JointLoss(nn.Module):
    """UniVision with its losses, and throw-away layers that read from its hidden states. Its MingTok is frozen."""

    def __init__(self, model: UniVision, weights: JointWeights | None = None) -> None:
        super().__init__()
        self.model, self.weights = model, weights or JointWeights()
        model.mingtok.requires_grad_(False)
        width = model.config.llm_config.hidden_size
        self.reader = nn.Linear(width, sum(SHOWN.values()))  # what a token to come shows
        self.pointer = nn.Linear(width, sum(map(len, ATTRIBUTES.values())))  # a thing that a prompt tells
        for throw_away in (self.reader, self.pointer):
            nn.init.zeros_(throw_away.weight)
            nn.init.zeros_(throw_away.bias)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and its parts: "text", "flow", "labels", "meant", "balance" (1: experts used alike)."""
        language_model, weights = self.model.language_model, self.weights
        latents, features = self.pictures(batch, generator)  # (P, N, C), (P, N, D)
        x = language_model.embed(batch.ids).flatten(0, 1)  # (R*L, H)
        places = batch.slots[:, None] + torch.arange(features.shape[1], device=x.device)  # (P, N)
        x = x.index_copy(0, places.flatten(), self.model.project(features).flatten(0, 1))
        seen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        seen[places[~batch.drawn].flatten()] = True
        shape = batch.ids.shape
        with noted_routing(language_model) as routing:
            hidden = language_model.model(
                x.unflatten(0, shape), batch.positions, Causal(batch.mask), seen.unflatten(0, shape)
            ).flatten(0, 1)
        asked = batch.wanted.flatten() != IGNORE
        logits = language_model.logits(hidden[asked])
        wrong = F.cross_entropy(logits, batch.wanted.flatten()[asked], reduction="none")
        counts = batch.counts.flatten()[asked]
        parts = {"text": (counts * wrong).sum() / counts.sum().clamp_min(1.0)}
        # each token is drawn from the hidden state of the one before it
        before = hidden[places[batch.drawn].flatten() - 1]
        parts["flow"] = flow_loss(
            self.model.flow_head,
            before,
            latents[batch.drawn].flatten(0, 1),
            batch.weights[batch.drawn].flatten(),
            weights.times,
            generator,
        )
        parts["labels"] = self.label_loss(before, batch.shown[batch.drawn], batch.weights[batch.drawn].flatten())
        parts["meant"] = self.meant_loss(hidden[batch.told], batch.meant)
        parts["balance"] = torch.stack(routing).mean()
        terms = ("text", "flow", "labels", "meant", "balance")
        parts["loss"] = sum((getattr(weights, name) * parts[name] for name in terms), start=x.new_zeros(()))
        return parts

    def label_loss(self, before: Tensor, shown: Tensor, weights: Tensor) -> Tensor:
        """How badly the reader tells what the next tokens show. before [n, H]; shown [P, kinds, N]; weights [n]."""
        loss = before.new_zeros(())
        kinds = self.reader(before).split(list(SHOWN.values()), dim=-1)
        for logits, labels in zip(kinds, shown.transpose(0, 1).flatten(1), strict=True):
            known = weights * (labels != IGNORE)
            wrong = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            loss = loss + (known * wrong).sum() / known.sum().clamp_min(1.0)
        return loss

    def meant_loss(self, hidden: Tensor, meant: Tensor) -> Tensor:
        """How badly the pointer tells the things of prompts. hidden [M, H]; meant [M, 4]."""
        logits = self.pointer(hidden).split([len(values) for values in ATTRIBUTES.values()], dim=-1)
        losses = (F.cross_entropy(x, y, reduction="sum") for x, y in zip(logits, meant.unbind(1), strict=True))
        return sum(losses, start=hidden.new_zeros(())) / max(len(meant), 1)

    @torch.no_grad()
    def pictures(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised latents [P, N, C], and the features that are fed: of noised latents where they are drawn."""
        tok = self.model.mingtok
        if len(batch.pictures):
            latents = to_tokens(tok.encode(from_uint8(batch.pictures)))
        else:
            latents = batch.weights.new_empty(*batch.weights.shape, tok.config.semantic_decoder.in_dim)
        spread = torch.rand(len(latents), 1, 1, generator=generator) * self.weights.noise
        noise = spread * torch.randn(latents.shape, generator=generator)
        fed = latents + noise.to(latents) * batch.drawn[:, None, None]
        return latents, tok.semantic_decoder(tok.denormalise(fed))


@contextlib.contextmanager
def noted_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """How unevenly experts are used meanwhile, layer by layer: 1 when alike, up to their number when one takes all."""
    found: list[Tensor] = []

    def note(module: MixtureOfExperts, args: tuple, output: Tensor) -> None:
        x, gate = args
        scores = module.scores(x.flatten(0, -2), None if gate is None else gate.flatten())  # (T, E)
        chosen = F.one_hot(scores.topk(module.top_k).indices, scores.shape[1]).sum(1).float()
        found.append(scores.shape[1] * (chosen.mean(0) / module.top_k * scores.mean(0)).sum())

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, MixtureOfExperts)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def flow_loss(
    head: FlowHead, hidden: Tensor, latents: Tensor, weights: Tensor, times: int, generator: torch.Generator
) -> Tensor:
    """Rectified flow: the head must say, at a point between noise and latent, which way the latent lies.

    hidden [n, H]; latents [n, C]; weights [n]. Every token is asked `times` times, at logit-normal times.
    """
    if not len(hidden):
        return hidden.sum() * 0.0
    t = torch.randn(times, len(hidden), generator=generator).sigmoid().to(latents)  # 1: noise, 0: latent
    noise = torch.randn(times, *latents.shape, generator=generator).to(latents)
    x = torch.lerp(latents, noise, t[..., None])
    velocity = head.net(x, t, head.vis_head(hidden)[None])
    error = (velocity - (latents - noise)).square().mean(-1)  # (times, n)
    return (error * weights).sum() / (weights.sum() * times)


# Layers that add to a residual stream begin small; those of the flow head that decide how much begin at 0.
_ADDED = ("attn.proj.weight", "mlp.w3.weight", "mlp.fc2.weight", "attention.dense.weight", "down_proj.weight", "down")
_ADDED_SCALE = 0.3
_EMBEDDING_STD = 0.3  # of the size of projected picture features
_TABLE_STD = 0.05  # position table and class token
_LOGITS_STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Random weights for training from nothing: matrices by the width that they take in."""
    for module in model.modules():
        norm = isinstance(module, (nn.LayerNorm, RMSNorm))
        for name, param in module.named_parameters(recurse=False):
            if norm and name == "weight":
                param.fill_(1.0)
            elif param.ndim < 2:
                param.zero_()
            elif param.ndim == 4:  # a convolution
                param.normal_(0, param[0].numel() ** -0.5, generator=generator)
            else:
                param.normal_(0, param.shape[-1] ** -0.5, generator=generator)
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0, _EMBEDDING_STD, generator=generator)
        elif isinstance(module, (ResBlock, FinalLayer)):
            for layer in (module.adaLN_modulation[1], getattr(module, "linear", None)):
                if layer is not None:
                    layer.weight.zero_()
    for name, param in model.named_parameters():
        if name.endswith(_ADDED):
            param.mul_(_ADDED_SCALE)
        elif name.endswith(("cls_token", "pos_embed")):
            param.normal_(0, _TABLE_STD, generator=generator)
        elif name.endswith("lm_head.weight"):
            param.normal_(0, _LOGITS_STD, generator=generator)
