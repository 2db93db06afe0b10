"""Examines this machine: `python quickstart.py doctor`. Prints one block of text, to be pasted into an issue.

It says what is installed, which product serves which precision and why, whether results are right here (the built-in
model, and random layers of the published widths, against float32 on the CPU), how fast memory and each part of an
image token are, and what to expect of the published size. ComfyUI's own Python can run it, from the pack's folder.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from ..ming_core import Conversation, Engine, Progress, Solver, UniVision, load_univision
from ..ming_core.config import (
    FlowHeadConfig,
    LanguageModelConfig,
    LowLevelEncoderConfig,
    MingTokConfig,
    PixelDecoderConfig,
    SemanticDecoderConfig,
    UniVisionConfig,
)
from ..ming_core.cost import TokenBytes, bandwidth, seconds, token_bytes, weight_bytes
from ..ming_core.cuda_graphs import Recorder, graphs_possible
from ..ming_core.experts import grouped_product_serves
from ..ming_core.few_rows import PackedWeights, large_layers, packed_products_work
from ..ming_core.flow_head import Sampler
from ..ming_core.kv_cache import DecodeCache
from ..ming_core.quantization import quantize
from ..ming_core.quantization.kernels import kernel_works

ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = ROOT / "models" / "tiny-shapes"
GB = 1e9
ROWS = 2  # guidance rows of a drawing from a prompt
PREFIX = 100  # tokens of a prompt
REPEATS = 5
RULE = Solver(8, "data_ab2")  # what is recommended
PROMPT = "Draw a red circle."
WIDTHS_DIVISOR = 8  # of the layers of a quick examination


class Precision(NamedTuple):
    """How weights are kept, and how far results may be from those in float32.

    features  least cosine similarity of a picture's features, by the built-in model
    layer     largest relative distance of what a part of a random layer gives; another choice of experts included
    """

    dtype: torch.dtype
    quantization: str | None
    features: float
    layer: float


PRECISIONS = {
    "fp32": Precision(torch.float32, None, 0.9999, 0.001),
    "bf16": Precision(torch.bfloat16, None, 0.98, 0.05),
    "int8": Precision(torch.bfloat16, "int8", 0.98, 0.06),
    "int4": Precision(torch.bfloat16, "int4", 0.85, 0.35),
}


class Report:
    """The lines of the block of text, and what is wrong."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.wrong: list[str] = []

    def title(self, text: str) -> None:
        self._add(f"\n{text}")

    def tell(self, name: str, found: str) -> None:
        self._add(f"  {name:<34} {found}")

    def judge(self, name: str, right: bool, found: str) -> None:
        """Tell what was found, and whether it is right."""
        self.tell(name, f"{'ok' if right else 'WRONG'}, {found}")
        if not right:
            self.wrong.append(f"{name}: {found}")

    def attempt(self, name: str, check: Callable[[], None]) -> None:
        """Run a check. What it raises is wrong too, whatever it is: the other checks are to run all the same."""
        try:
            check()
        except Exception as error:
            self.judge(name, False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _add(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def main(*, quick: bool = False) -> int:
    """Examine this machine; the exit code of the process: 1 if something is wrong.

    quick: narrow layers instead of those of the published widths. Results are checked, and times mean nothing.
    """
    log = logging.getLogger("ming_univision")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return _examine(quick)
    finally:
        log.setLevel(level)


def _examine(quick: bool) -> int:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    report = Report()
    with torch.no_grad():
        _machine(report, device)
        _products(report, device)
        _built_in(report, device)
        _layers(report, device, quick)
        if device.type == "cuda":
            report.attempt("tests on this GPU", lambda: _gpu_tests(report))
    report.title("All is well." if not report.wrong else "Something is wrong:")
    for problem in report.wrong:
        report.tell("", problem)
    return 1 if report.wrong else 0


# --- What there is ------------------------------------------------------------------------------------------------


def _machine(report: Report, device: torch.device) -> None:
    report.title("Machine")
    report.tell("system", f"{platform.system()} {platform.release()}, {platform.machine()}")
    report.tell("Python", platform.python_version())
    report.tell("PyTorch", f"{torch.__version__}, CUDA {torch.version.cuda}, ROCm {torch.version.hip}")
    cores = f"{psutil.cpu_count(logical=False)} cores, {torch.get_num_threads()} threads of PyTorch"
    report.tell("processor", f"{platform.processor() or platform.machine()}, {cores}")
    report.tell("load", f"{psutil.getloadavg()[0]:.1f}: times mean something only where nothing else runs")
    report.tell("instructions", torch.backends.cpu.get_cpu_capability())
    memory = psutil.virtual_memory()
    report.tell("memory", f"{memory.total / GB:.1f} GB, {memory.available / GB:.1f} GB free")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        report.tell(
            "GPU", f"{torch.cuda.get_device_name(device)}, capability {torch.cuda.get_device_capability(device)}"
        )
        report.tell("GPU memory", f"{total / GB:.1f} GB, {free / GB:.1f} GB free")
        report.tell("allocator", torch.cuda.get_allocator_backend())
    else:
        report.tell("GPU", "none that CUDA knows: everything below is about the CPU")


def _products(report: Report, device: torch.device) -> None:
    """Which product serves which precision, and why."""
    report.title("Products")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        packed = device.type == "cpu" and packed_products_work(dtype)
        report.tell(name, "PyTorch's linear layers" + (", packed for few rows, tried and right" if packed else ""))
    x = torch.zeros(1, 1, device=device, dtype=torch.bfloat16)
    fast = "one grouped kernel for all experts" if grouped_product_serves(x) else "gathered or one after the other"
    why = "" if device.type == "cpu" else " (the grouped kernel needs compute capability 9 or 10)"
    report.tell("experts in bf16", fast if device.type == "cuda" and grouped_product_serves(x) else fast + why)
    for kind, kernel in (("int8", "int8" if device.type == "cpu" else "int8 halves"), ("int4", "int4")):
        works = kernel_works(kernel, device, torch.bfloat16)
        slow = "dequantized for every product: no kernel gave the right numbers here"
        report.tell(kind, f"the kernel for {kernel}, tried and right" if works else slow)
    possible = "recorded and compared with plain steps in every drawing"
    report.tell("CUDA graphs", possible if graphs_possible(device) else "none on this device")


# --- Whether results are right ------------------------------------------------------------------------------------


def _built_in(report: Report, device: torch.device) -> None:
    report.title("The built-in model, against float32 on the CPU")
    expected = _drawn(load_univision(BUILT_IN))
    for name, precision in PRECISIONS.items():

        def check(name: str = name, precision: Precision = precision) -> None:
            engine = load_univision(BUILT_IN, device=device, dtype=precision.dtype, quantization=precision.quantization)
            engine.network.language_model.cuda_graphs = False
            plain = _drawn(engine)
            alike = _cosine(plain, expected)
            report.judge(f"{name}, a picture", alike >= precision.features, f"cosine similarity {alike:.5f}")
            if device.type == "cuda":
                _on_a_gpu(report, name, engine, plain)

        report.attempt(f"{name}, a picture", check)


def _on_a_gpu(report: Report, name: str, engine: Engine, plain: Tensor) -> None:
    """Nothing waits in the token loop, where nothing has to, and graphs give what plain steps give."""
    rows = torch.zeros(ROWS, engine.config.llm_config.hidden_size, dtype=engine.dtype, device=plain.device)
    if engine.network.language_model.synchronizes(rows.to(engine.network.device)):
        report.tell(f"{name}, waiting", "experts wait for the device here: no other product serves")
    else:
        last = engine.config.llm_config.num_image_tokens_for_gen

        def on_token(progress: Progress) -> None:
            if progress.kind == "image" and progress.done in (1, last):
                torch.cuda.set_sync_debug_mode("error" if progress.done == 1 else "default")

        try:
            _drawn(engine, on_token)
            report.judge(f"{name}, waiting", True, "nothing waits between image tokens")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    engine.network.language_model.cuda_graphs = True
    alike = _cosine(_drawn(engine), plain)
    found = f"cosine similarity {alike:.5f} to plain steps{', recording failed' if Recorder.failed else ''}"
    report.judge(f"{name}, graphs", alike >= 0.99 and not Recorder.failed, found)


def _drawn(engine: Engine, on_token: Callable[[Progress], None] | None = None) -> Tensor:
    """The features of a picture."""
    engine.prefix_cache.clear()
    options = {"seed": 1, "solver": Solver(4, "data_ab2"), "max_new_tokens": 1}
    return engine.generate_image(Conversation(), PROMPT, on_token=on_token, **options).features.tokens


def _cosine(found: Tensor, expected: Tensor) -> float:
    return float(torch.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0))


# --- Layers of the published widths -------------------------------------------------------------------------------


def _layers(report: Report, device: torch.device, quick: bool) -> None:
    exact = layer_network(WIDTHS_DIVISOR if quick else 1)
    speed = bandwidth(device, 1 << 24) if quick else bandwidth(device)
    report.title("Layers of the published widths, random weights" if not quick else "Narrow layers, random weights")
    what = "read by all threads" if device.type == "cpu" else "copied"
    report.tell("memory", f"{speed / GB:.1f} GB/s {what}")
    report.tell("", f"floor: the bytes of an image token at this speed; {RULE.method}, {RULE.steps} steps, {ROWS} rows")
    expected = {name: run().float().cpu() for name, run in parts(exact, packed=False).items()}
    for name, precision in PRECISIONS.items():

        def check(name: str = name, precision: Precision = precision) -> None:
            network = copy.deepcopy(exact).to(precision.dtype)
            if precision.quantization:
                quantize(network, precision.quantization)
            network.to(device)
            _compare(report, name, network, expected, precision.layer)
            if not quick:
                _expect(report, name, network, precision, speed)

        report.attempt(f"{name}, layers", check)


def _compare(report: Report, name: str, network: UniVision, expected: dict[str, Tensor], most: float) -> None:
    """Compare what every part gives with the same in float32 on the CPU."""
    wrong = {
        part: float((run().float().cpu() - expected[part]).norm() / expected[part].norm())
        for part, run in parts(network).items()
    }
    largest = max(wrong, key=wrong.__getitem__)
    found = f"off by {wrong[largest]:.2g} at most ({largest.replace('_', ' ')})"
    report.judge(f"{name}, results", all(error <= most for error in wrong.values()), found)  # NaN is wrong


def _expect(report: Report, name: str, network: UniVision, precision: Precision, speed: float) -> None:
    """Time every part, and tell what to expect of the published size."""
    # the least, since other work can only take more
    times = [min(seconds(run, network.device) for _ in range(REPEATS)) for run in parts(network).values()]
    here, published = token_bytes(network, ROWS, RULE.steps or 1), published_network(precision)
    there = token_bytes(published, ROWS, RULE.steps or 1)
    multiples = [took / (size / speed) for took, size in zip(times, here, strict=True)]
    shown = ", ".join(f"{part} {multiple:.2f}" for part, multiple in zip(TokenBytes._fields, multiples, strict=True))
    report.tell(f"{name}, multiples of the floor", shown.replace("_", " "))
    token = sum(multiple * size / speed for multiple, size in zip(multiples, there, strict=True))
    tokens = published.config.llm_config.num_image_tokens_for_gen
    floor = there.total / speed
    report.tell(f"{name}, expected at full size", f"{token:.3f} s an image token, {token / floor:.2f} of the floor")
    memory = weight_bytes(published) + published.language_model.working_memory(PREFIX, ROWS, tokens)
    needed = f"{memory / GB:.1f} GB of memory"
    if network.device.type == "cpu":
        has, too_much = psutil.virtual_memory().total, "more than this machine has"
        packed = sum(layer.weight.nbytes for layer in large_layers(*published.read_by_a_token))
        needed += f", and {packed / GB:.1f} GB for packed weights if twice that is free"
    else:
        has = torch.cuda.mem_get_info(network.device)[1]
        too_much = "more than this GPU has, so part of the model waits in RAM"
    if memory > has:
        needed += f": {too_much}"
    report.tell("", f"{tokens * token:.0f} s a picture, {needed}")


def layer_network(divisor: int = 1) -> UniVision:
    """One layer of every part in float32, of the published widths divided by `divisor`, with random weights.

    It has 16 experts, of which the published number is chosen, so that a machine for the whole model can hold it.
    """
    language_model = LanguageModelConfig(
        vocab_size=16,
        hidden_size=2048 // divisor,
        num_hidden_layers=1,
        head_dim=128 // divisor,
        num_experts=16,
        moe_intermediate_size=1408 // divisor // 64 * 64,
        eos_token_id=0,
        image_patch_token=1,
        image_start_token=2,
    )
    mingtok = MingTokConfig(
        LowLevelEncoderConfig(depth=1, embed_dim=64),
        SemanticDecoderConfig(embed_dim=1024 // divisor, decoder_depth=1),
        PixelDecoderConfig(embed_dim=64, decoder_depth=1),
    )
    config = UniVisionConfig(language_model, FlowHeadConfig(diffloss_w=3072 // divisor, diffloss_d=1), mingtok)
    network = UniVision(config, device="meta").to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, spread, generator=generator)
    return network


def published_network(precision: Precision) -> UniVision:
    """The published size without its weights."""
    config = UniVisionConfig(mingtok_config=MingTokConfig())
    network = UniVision(config, device="meta", dtype=precision.dtype)
    if precision.quantization:
        quantize(network, precision.quantization)
    return network


def parts(network: UniVision, *, packed: bool = True) -> dict[str, Callable[[], Tensor]]:
    """The parts of an image token, each with the same inputs in every precision, as `TokenBytes` names them.

    packed: whether a CPU multiplies few rows by packed weights, as it does while an image is drawn.
    """
    model, device, dtype = network.language_model, network.device, network.dtype
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    prefix = model.new_cache(PREFIX)
    model.prefill(random(PREFIX, model.config.hidden_size), prefix)
    x, z = random(ROWS, 1, model.config.hidden_size), random(1, ROWS, network.config.vishead_diffloss_config.diffloss_w)
    noise, latent = random(1, network.flow_head.net.channels).float(), random(1, 1, network.flow_head.net.channels)
    sampler = Sampler(network.flow_head.net, (3.0, -2.0), RULE.steps or 1, RULE, device=device, dtype=dtype)
    around = PackedWeights(*network.read_by_a_token if packed else ()).around
    return {
        "language_model": around(lambda: model.decode(x, DecodeCache(prefix, 1, ROWS))),
        "flow_head": around(lambda: sampler.draw(z, noise)),
        "semantic_decoder": around(lambda: network.project(network.mingtok.stream(1, 1).append(latent))),
    }


# --- The tests that need a GPU ------------------------------------------------------------------------------------


def _gpu_tests(report: Report) -> None:
    tests = ROOT / "tests" / "ming_core" / "test_gpu.py"
    if not tests.is_file() or importlib.util.find_spec("pytest") is None:
        report.tell("tests on this GPU", "left out: they need the pack's tests and pytest")
        return
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(tests)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = ended.stdout.strip().splitlines() or [f"exit code {ended.returncode}"]
    report.judge("tests on this GPU", ended.returncode == 0, lines[-1])
