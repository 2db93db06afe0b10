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
            # (rows, vocabulary); a NaN would end multinomial with an error that names no remedy
            probs = ((logits.cpu() - best) / temperature).softmax(-1).nan_to_num(1)
            probs, order = probs.sort(dim=-1, descending=True)
            # the nucleus: tokens before which less than top_p has been collected, at least one
            probs[probs.cumsum(-1) - probs >= self.sampling.top_p] = 0
            # (rows, 1); multinomial takes weights of any sum
            chosen = order.gather(1, torch.multinomial(probs, 1, generator=self.generator))
        # one transfer to the host for both, the tokens and whether the logits were finite
        ids = chosen.where(best.isfinite(), NO_TOKEN)[:, 0].tolist()
        if NO_TOKEN in ids:
            raise nonfinite_error(self.language_model.dtype)
        return ids
