"""Our implementation against a plain one of the same mathematics (plain.py), and batches, as ratios made in one run.

    python benchmarks/speed.py [--tokens 256] [--repeats 3] [--threads 1] [--plot docs/speed.png]

Measured on the reduced model (reduced.py), which has the published proportions. Both sides of a ratio are measured
alternately, and their medians compared. Drawing is bound by reading weights, so beside every part stands how many times
as many weights the plain implementation reads: what not reading them can gain at most. A second table tells each time
as a multiple of the floor: the bytes that must be read, at the bandwidth that is measured in the same run.
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

from ming_core import Conversation, Engine, Features, Guidance, ImageResult, Solver, UniVision
from ming_core.conversation import Image, guidance_masks
from ming_core.cost import bandwidth, token_bytes, weight_bytes
from ming_core.few_rows import PackedWeights
from ming_core.flow_head import Sampler
from ming_core.kv_cache import DecodeCache
from ming_core.quantization import quantize

PROMPT = "Please generate the corresponding image based on the description. a large red circle on a white background"
STEPS = 16
FAST = Solver(STEPS // 2, "data_ab2")  # as accurate as STEPS of Euler (steps.py)
LM_STEPS = 8  # tokens forwarded for one measurement of the language model


class Case(NamedTuple):
    """A round to draw, as both implementations take it.

    rows        guidance rows: two for a prompt of text alone, three with an image in it
    prompt      [P, H], embeddings of the prompt
    image_gate  bool [P], the tokens for the image router
    masks       bool [rows, P], what each guidance row sees
    noise       [N, C], for the plain implementation
    """

    engine: Engine
    rows: int
    features: Features | None
    prompt: Tensor
    image_gate: Tensor
    masks: Tensor
    noise: Tensor

    @property
    def guidance_weights(self) -> tuple[float, ...]:
        return Guidance().weights(self.rows)

    def ours(self, images: int = 1, solver: Solver | None = None) -> list[ImageResult]:
        """Draw with our implementation, with nothing in the prefix cache."""
        self.engine.prefix_cache.clear()
        return self.engine.generate_images(
            Conversation(),
            PROMPT,
            seeds=range(images),
            features=self.features,
            max_new_tokens=1,
            solver=solver or Solver(STEPS),
        )

    def plain(self) -> Tensor:
        """Draw with the plain implementation."""
        return plain.draw(
            self.engine.network,
            self.prompt,
            self.image_gate,
            self.masks,
            self.noise,
            self.guidance_weights,
            STEPS,
        )


def make_case(engine: Engine, rows: int) -> Case:
    """A first round with a prompt of text alone (two guidance rows) or with an attached image (three)."""
    generator = torch.Generator().manual_seed(rows)
    grid, channels = engine.config.drawing_grid, engine.network.flow_head.net.channels
    features = None
    if rows == 3:
        features = engine.mingtok.semantic_features(torch.randn(1, channels, *grid, generator=generator))
    part = engine.chat.prompt([[Image(features, drawn=False)] if features else "", PROMPT])
    prompt, image_gate = plain.embed(engine.network, part.segments)
    noise = torch.randn(grid[0] * grid[1], channels, generator=generator)
    return Case(engine, rows, features, prompt, image_gate, guidance_masks((part,)), noise)


class Pair(NamedTuple):
    """One part of a step in both implementations; `reads`: how many times as many weights the plain one reads."""

    name: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    reads: float


def parts(case: Case) -> Iterator[Pair]:
    """The parts of a step, each with the same inputs for both implementations."""
    network, rows = case.engine.network, case.rows
    hidden = torch.randn(
        LM_STEPS, rows, network.config.llm_config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    # as while an image is drawn: packed beforehand, in the first call, which is not measured
    packed = PackedWeights(*network.read_by_a_token)
    for pair in (_language_model(case, hidden), _flow_head(case, hidden[0]), _semantic_decoder(case)):
        yield pair._replace(ours=packed.around(pair.ours))


def _semantic_decoder(case: Case) -> Pair:
    network, rows = case.engine.network, case.rows

    def ours() -> Tensor:
        stream = network.mingtok.stream(1, len(case.noise))
        return torch.cat([stream.append(latent[None, None]) for latent in case.noise], dim=1)

    def without_optimizations() -> Tensor:
        cache: plain.Cache = []
        out = []
        for latent in case.noise:
            y, cache = plain.expand(network.mingtok, latent.expand(rows, 1, -1), cache)
            out.append(y[:1])
        return torch.cat(out, dim=1)

    return Pair(f"semantic decoder, an image of {rows} rows", ours, without_optimizations, 1.0)


def _language_model(case: Case, hidden: Tensor) -> Pair:
    network, rows = case.engine.network, case.rows
    prefix = network.language_model.new_cache(len(case.prompt))
    network.language_model.prefill(case.prompt, prefix, case.image_gate)
    positions = torch.arange(len(case.prompt))[None]
    _, prompt_cache = plain.forward(network, case.prompt[None], positions, None, [], case.image_gate)
    prompt_cache = [(k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in prompt_cache]

    def ours() -> Tensor:
        cache = DecodeCache(prefix, LM_STEPS, rows, case.masks)
        return torch.stack([network.language_model.decode(x[:, None], cache)[:, 0] for x in hidden])

    def without_optimizations() -> Tensor:
        cache, masks, out = prompt_cache, case.masks, []
        for x in hidden:
            masks = torch.cat([masks, torch.ones(rows, 1, dtype=torch.bool)], dim=1)
            y, cache = plain.forward(network, x[:, None], masks.sum(1, keepdim=True) - 1, masks, cache)
            out.append(y[:, 0])
        return torch.stack(out)

    return Pair(f"language model, {LM_STEPS} steps of {rows} rows", ours, without_optimizations, 1.0)


def _flow_head(case: Case, hidden: Tensor) -> Pair:
    head, start = case.engine.network.flow_head, case.noise[:1]
    net = head.net
    sampler = Sampler(net, case.guidance_weights, STEPS, Solver())
    modulation = _weight_count(net.time_embed, net.cond_embed, *(b.adaLN_modulation for b in net.res_blocks))
    modulation += _weight_count(net.final_layer.adaLN_modulation)
    every_step = STEPS * _weight_count(net)
    return Pair(
        f"flow head, a token of {case.rows} rows",
        lambda: sampler.draw(head.vis_head(hidden)[None], start),
        lambda: plain.sample(head, hidden, start, case.guidance_weights, STEPS),
        every_step / (every_step - (STEPS - 1) * modulation - _weight_count(net.time_embed)),
    )


def floors(network: UniVision, tokens: int, rows: list[int]) -> dict[str, float]:
    """The bytes of weights that each part of the tables above must read, by its name there."""
    found = {}
    for n in rows:
        plainly, fast = (token_bytes(network, n, steps) for steps in (STEPS, STEPS // 2))
        found[f"language model, {LM_STEPS} steps of {n} rows"] = LM_STEPS * plainly.language_model
        found[f"flow head, a token of {n} rows"] = plainly.flow_head
        # without the projection, which is not measured there
        semantic = plainly.semantic_decoder - weight_bytes(network.linear_proj)
        found[f"semantic decoder, an image of {n} rows"] = tokens * semantic
        # the language model runs once more than there are tokens
        found[f"whole image, {n} rows"] = tokens * plainly.total + plainly.language_model
        whole = tokens * fast.total + fast.language_model
        found[f"whole image with {FAST.steps} steps of {FAST.method}, {n} rows"] = whole
    return found


def repeat(times: int, run: Callable[[], object]) -> None:
    """Call `run` so many times."""
    for _ in range(times):
        run()


def _weight_count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def check_equal(name: str, ours: Callable[[], Tensor], other: Callable[[], Tensor]) -> None:
    """Raise RuntimeError unless both give the same: the ratio of two different things means nothing."""
    a, b = ours(), other()
    if not (a - b).abs().max() <= 1e-3 * max(1.0, float(b.abs().max())):  # NaN is not equal either
        raise RuntimeError(f"{name}: the two implementations differ by {(a - b).abs().max():.2g}")


def plot(ratios: dict[str, float], path: Path) -> None:
    """Draw the ratios as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.32 * len(ratios) + 0.9), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(list(ratios), list(ratios.values()), height=0.65, color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(xlabel="time of the other way / our time", xlim=(0, 1.15 * max(ratios.values())))
    figure.savefig(path, dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per image, a square number (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--plot", type=Path, help="file for a plot of the ratios (needs matplotlib)")
    options = parser.parse_args()
    if options.plot:
        import matplotlib  # noqa: F401 - to fail now where it is not installed, not after the measurements
    torch.set_num_threads(options.threads)
    engine = reduced_model(options.tokens)
    ratios: dict[str, float] = {}
    ours_took: dict[str, float] = {}

    def row(name: str, ours: Callable[[], object], other: Callable[[], object], repeats: int, *more: str) -> None:
        seconds = medians({"ours": ours, "other": other}, repeats)
        ratios[name], ours_took[name] = seconds["other"] / seconds["ours"], seconds["ours"]
        cells = [name, *(f"{x:.3f}" for x in seconds.values()), f"{ratios[name]:.2f}", *more]
        print(f"| {' | '.join(cells)} |", flush=True)

    million = _weight_count(engine.network) / 1e6
    print(f"{machine()}; {million:.0f} million weights, {options.tokens} tokens per image\n")
    print("| what | ours, s | plain, s | ratio | ratio of weights read |\n|---|---|---|---|---|")
    cases = [make_case(engine, rows) for rows in (2, 3)]
    for case in cases:
        for part in parts(case):
            check_equal(part.name, part.ours, part.plain)
            row(part.name, part.ours, part.plain, 4 * options.repeats, f"{part.reads:.2f}")
        row(f"whole image, {case.rows} rows", case.ours, case.plain, options.repeats, "")
        fast = partial(case.ours, solver=FAST)
        row(
            f"whole image with {FAST.steps} steps of {FAST.method}, {case.rows} rows",
            fast,
            case.plain,
            options.repeats,
            "",
        )
    for kind in ("bf16", "int8"):  # the plain implementation stays in float32
        engine = reduced_model(options.tokens)
        engine.network.to(torch.bfloat16)
        if kind == "int8":
            quantize(engine.network, kind)
        for case in cases:
            name = f"whole image in {kind} with {FAST.steps} steps of {FAST.method}, {case.rows} rows"
            row(name, partial(case._replace(engine=engine).ours, solver=FAST), case.plain, options.repeats, "")
    speed = bandwidth(torch.device("cpu"))
    print(f"\n{speed / 1e9:.1f} GB/s are read\n\n| what | GB | floor, s | ours, s | multiple |\n|---|---|---|---|---|")
    for name, size in floors(cases[0].engine.network, options.tokens, [case.rows for case in cases]).items():
        floor = size / speed
        print(f"| {name} | {size / 1e9:.3f} | {floor:.3f} | {ours_took[name]:.3f} | {ours_took[name] / floor:.2f} |")
    print("\n| what | ours, s | the other, s | ratio |\n|---|---|---|---|")
    for case in cases:
        name = f"four images in one pass, against one by one, {case.rows} rows"
        row(name, partial(case.ours, 4), partial(repeat, 4, case.ours), options.repeats)
    if options.plot:
        plot(ratios, options.plot)


if __name__ == "__main__":
    main()
