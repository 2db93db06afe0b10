"""The text loop: one token a step for every row, until its end token or the limit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kv_cache import DecodeCache
from .language_model import LanguageModel
from .offload import nonfinite_error
from .options import Sampling
from .prompts import ChatFormat, TextStream
from .rounds import OnToken, Progress

MIN_TEMPERATURE = 1e-30  # a temperature below is taken as this one: in float32 it would be 0
CANDIDATES = 128  # tokens that are sorted at first, of some 150 thousand; usually one of them is chosen
NO_TOKEN = -1  # chosen where the logits are not finite


@dataclass
class WrittenText:
    """Tokens that one row emitted, and their logits when they are kept."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def __add__(self, later: WrittenText) -> WrittenText:
        return WrittenText(self.ids + later.ids, self.logits + later.logits)

    def stacked_logits(self) -> Tensor | None:
        return torch.stack(self.logits) if self.logits else None


class TextDecoder:
    """Writes the text of one round, before and after an image alike.

    limit  tokens of text that the round may emit in all
    """

    def __init__(
        self,
        language_model: LanguageModel,
        chat: ChatFormat,
        limit: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        on_token: OnToken,
        keep_logits: bool,
    ) -> None:
        self.language_model, self.limit, self.sampling, self.generator = language_model, limit, sampling, generator
        self.on_token, self.keep_logits = on_token, keep_logits
        self.stream = TextStream(chat)  # what the first row says before an image and after it

    def write(
        self,
        cache: DecodeCache,
        hidden: Tensor,
        *,
        stop: Collection[int],
        forbidden: int | None = None,
        written: int = 0,
    ) -> list[WrittenText]:
        """Emit tokens in every row, from the hidden states [rows, H] of the tokens before.

        stop       tokens that end a row; they are emitted and not forwarded
        forbidden  a token that is never chosen
        written    tokens that count against the limit already
        """
        out = [WrittenText() for _ in range(cache.rows)]
        open_rows = set(range(cache.rows))
        for count in range(written + 1, self.limit + 1):
            logits = self.language_model.logits(hidden)  # float32 (rows, vocabulary)
            chosen = self._choose(logits, forbidden)  # rows that have ended go on with the others, unread
            for row in sorted(open_rows):
                out[row].ids.append(chosen[row])
                if self.keep_logits:
                    # 0.5 MB a token at the published size: in host memory, and only when asked for
                    out[row].logits.append(logits[row].cpu())
                if chosen[row] in stop:
                    open_rows.discard(row)
            if self.on_token:
                first_row_goes_on = len(out[0].ids) == count - written
                # progress tells of the first row alone: once it has ended, its text stands still
                text = self.stream.push(chosen[0]) if first_row_goes_on else self.stream.text
                self.on_token(Progress("text", count, self.limit, text))
            if not open_rows or count == self.limit:  # the last token is emitted, and never forwarded
                break
            ids = torch.tensor(chosen, device=hidden.device)  # (rows,)
            # all rows, ended ones too: a step costs the reading of the weights, not the rows
            hidden = self.language_model.decode(self.language_model.embed(ids)[:, None], cache)[:, 0]
        return out

    def _choose(self, logits: Tensor, forbidden: int | None) -> list[int]:
        """The next token of every row. logits float32 [rows, vocabulary]."""
        # `<image>` in a text would open an image that nobody draws
        if forbidden is not None:
            # the caller keeps the logits as the model gave them
            logits = logits.clone()
            logits[:, forbidden] = float("-inf")
        best = logits.amax(-1, keepdim=True)  # subtracted below, so that no temperature overflows
        if self.sampling.temperature == 0:
            # greedy, as the published code generates
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # sampled on the CPU, so that a seed means the same on every device; rows that are not finite are, too
            best = best.cpu()
            temperature = max(self.sampling.temperature, MIN_TEMPERATURE)
            # (rows, vocabulary); NaN is refused below
            probs = ((logits.cpu() - best) / temperature).softmax(-1).nan_to_num(1)
            chosen = sample(probs, self.sampling.top_p, self.generator)  # (rows, 1)
        # one transfer to the host for both, the tokens and whether the logits were finite
        ids = chosen.where(best.isfinite(), NO_TOKEN)[:, 0].tolist()
        if NO_TOKEN in ids:
            raise nonfinite_error(self.language_model.dtype)
        return ids


def sample(probs: Tensor, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose one token for each row of probs [rows, vocabulary], on the CPU, from the nucleus of mass top_p: [rows, 1].

    Every token waits for an exponentially distributed time, and the first to come is chosen where the rates are its
    probabilities: the largest of p / waiting time. As torch.multinomial does with all tokens sorted, and the same token
    for the same seed, but only as many are sorted as can have won: of the others the n-th most likely has at most an
    n-th of the mass that is left.
    """
    count = probs.shape[-1]
    waiting = torch.empty_like(probs).exponential_(generator=generator)  # by rank, the most likely token first
    candidates = min(CANDIDATES, count)
    while True:
        best, order = probs.topk(candidates, dim=-1)
        collected = best.cumsum(-1)
        # the nucleus: tokens before which less than top_p has been collected, at least one
        best[collected - best >= top_p] = 0
        first = (best / waiting[:, :candidates]).max(-1, keepdim=True)
        # more than the rest can have: 0 where the nucleus ends before, and some more than what rounding leaves out
        left = torch.where(best[:, -1:] > 0, probs.sum(-1, keepdim=True) - collected[:, -1:] + 1e-4, 0)
        numbers = torch.arange(1, count - candidates + 1, device=left.device)
        limits = torch.minimum(left / numbers, best[:, -1:])  # (rows, those not sorted)
        if bool((limits / waiting[:, candidates:] < first.values).all()):  # true of none, too
            return order.gather(1, first.indices)
        candidates = min(4 * candidates, count)
