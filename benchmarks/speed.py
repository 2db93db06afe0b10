"""Our step against a plain implementation of the same mathematics (plain.py), and batches: ratios made in one run.

    python benchmarks/speed.py [--tokens 256] [--repeats 3] [--threads 1] [--plot docs/speed.png]

On a model of the published proportions (reduced.py). Both sides of a ratio are measured in turn, and medians compared.
Drawing is bound by reading weights, so beside every part stands how much more of them the plain way reads: what leaving
out reads alone can give.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import plain
import torch
from reduced import reduced_model
from timing import machine, medians
from torch import Tensor, nn

from ming_core import Conversation, Features, Guidance, Solver, UniVision
from ming_core.conversation import Picture, guidance_masks
from ming_core.flow_head import Sampler
from ming_core.language_model import Rows
from ming_core.rounds import embed

PROMPT = "Please generate the corresponding image based on the description. a large red circle on a white background"
STEPS = 16
LM_STEPS = 8  # tokens forwarded for one measurement of the language model


class Case(NamedTuple):
    """A round to draw, as both sides take it."""

    model: UniVision
    rows: int  # guidance rows: two for words alone, three with a picture
    features: Features | None
    prompt: Tensor  # [P, H]
    image_gate: Tensor | None
    views: Tensor
    noise: Tensor  # [N, C], for the plain way

    @property
    def factors(self) -> tuple[float, ...]:
        return Guidance().factors(self.rows)

    def ours(self, pictures: int = 1, solver: Solver | None = None) -> object:
        self.model.prefix_cache.clear()
        options = {"features": self.features, "max_new_tokens": 1, "solver": solver or Solver(STEPS)}
        return self.model.generate_images(Conversation(), PROMPT, seeds=list(range(pictures)), **options)

    def plain(self) -> Tensor:
        return plain.draw(self.model, self.prompt, self.image_gate, self.views, self.noise, self.factors, STEPS)


def make_case(model: UniVision, rows: int) -> Case:
    """A first round with words alone (two guidance rows) or with an attached picture (three)."""
    generator = torch.Generator().manual_seed(rows)
    grid, channels = model.config.drawing_grid, model.flow_head.net.channels
    features = None
    if rows == 3:
        features = model.mingtok.semantic_features(torch.randn(1, channels, *grid, generator=generator))
    part = model.chat.prompt([[Picture(features, False)] if features else "", PROMPT])
    embeddings, image_gate = embed(model, part.segments)
    noise = torch.randn(grid[0] * grid[1], channels, generator=generator)
    views = guidance_masks((part,))
    return Case(model, rows, features, embeddings, image_gate, views, noise)


Pair = tuple[str, Callable[[], object], Callable[[], object], float]  # name, ours, plain, weights that plain reads more


def parts(case: Case) -> Iterator[Pair]:
    """The parts of a step, each from the same inputs on both sides."""
    model, rows = case.model, case.rows
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(LM_STEPS, rows, model.config.llm_config.hidden_size, generator=generator)
    prefix = model.language_model.prefix(len(case.prompt))
    model.language_model.prefill(case.prompt, prefix, case.image_gate)
    _, cache = plain.forward(model, case.prompt[None], torch.arange(len(case.prompt))[None], None, [], case.image_gate)
    cache = [(k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in cache]

    def language_model() -> Tensor:
        ours = Rows(prefix, LM_STEPS, rows, case.views)
        return torch.stack([model.language_model.step(x, ours) for x in hidden])

    def plain_language_model() -> Tensor:
        grown, mask, out = cache, case.views, []
        for x in hidden:
            mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.bool)], dim=1)
            y, grown = plain.forward(model, x[:, None], mask.sum(1, keepdim=True) - 1, mask, grown)
            out.append(y[:, 0])
        return torch.stack(out)

    yield f"language model, {LM_STEPS} steps of {rows} rows", language_model, plain_language_model, 1.0

    net, start = model.flow_head.net, case.noise[:1]
    sampler = Sampler(net, case.factors, STEPS, Solver())
    modulation = _values(net.time_embed, net.cond_embed, *(b.adaLN_modulation for b in net.res_blocks))
    modulation += _values(net.final_layer.adaLN_modulation)
    every_step = STEPS * _values(net)
    yield (
        f"flow head, a token of {rows} rows",
        lambda: sampler.draw(model.flow_head.vis_head(hidden[0])[None], start),
        lambda: plain.sample(model.flow_head, hidden[0], start, case.factors, STEPS),
        every_step / (every_step - (STEPS - 1) * modulation - _values(net.time_embed)),
    )

    def semantic_decoder() -> Tensor:
        stream = model.mingtok.stream(1, len(case.noise))
        return torch.cat([stream.append(latent[None, None]) for latent in case.noise], dim=1)

    def plain_semantic_decoder() -> Tensor:
        grown, out = [], []
        for latent in case.noise:
            y, grown = plain.expand(model.mingtok, latent.expand(rows, 1, -1), grown)
            out.append(y[:1])
        return torch.cat(out, dim=1)

    yield f"semantic decoder, a picture of {rows} rows", semantic_decoder, plain_semantic_decoder, 1.0


def repeat(times: int, run: Callable[[], object]) -> None:
    for _ in range(times):
        run()


def _values(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def check_equal(name: str, ours: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """A ratio of unequal things means nothing."""
    a, b = ours(), other()
    if not (a - b).abs().max() <= 1e-3 * max(1.0, float(b.abs().max())):  # NaN is not equal either
        raise RuntimeError(f"{name}: the two ways differ by {(a - b).abs().max():.2g}")


def plot(ratios: dict[str, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.32 * len(ratios) + 0.9), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(ratios), list(ratios.values()), height=0.65, color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="the other way takes so many times as long", xlim=(0, 1.15 * max(ratios.values())))
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of a picture, a square number (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="picture of the ratios (needs matplotlib)")
    options = parser.parse_args()
    if options.plot:
        import matplotlib  # noqa: F401 - said now that it is not there, not after the measurements
    torch.set_num_threads(options.threads)
    model = reduced_model(options.tokens)
    ratios: dict[str, float] = {}

    def row(name: str, ours: Callable[[], object], other: Callable[[], object], repeats: int, *more: str) -> None:
        seconds = medians({"ours": ours, "other": other}, repeats)
        ratios[name] = seconds["other"] / seconds["ours"]
        cells = [name, *(f"{x:.3f}" for x in seconds.values()), f"{ratios[name]:.2f}", *more]
        print(f"| {' | '.join(cells)} |", flush=True)

    print(f"{machine()}; {_values(model) / 1e6:.0f} million weights, {options.tokens} tokens a picture\n")
    print("| what | ours, s | plain, s | ratio | ratio of weights read |\n|---|---|---|---|---|")
    cases = [make_case(model, rows) for rows in (2, 3)]
    for case in cases:
        for name, ours, other, reads in parts(case):
            check_equal(name, ours, other)
            row(name, ours, other, 4 * options.repeats, f"{reads:.2f}")
        row(f"whole picture, {case.rows} rows", case.ours, case.plain, options.repeats, "")
    print("\n| what | ours, s | the other, s | ratio |\n|---|---|---|---|")
    for case in cases:
        name = f"four pictures in one pass, against one by one, {case.rows} rows"
        row(name, partial(case.ours, 4), partial(repeat, 4, case.ours), options.repeats)
        name = f"ab2 with {STEPS // 2} steps, against euler with {STEPS}, {case.rows} rows"
        row(name, partial(case.ours, solver=Solver(STEPS // 2, "ab2")), case.ours, options.repeats)
    if options.plot:
        plot(ratios, options.plot)


if __name__ == "__main__":
    main()
