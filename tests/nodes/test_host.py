"""What users see while a node runs: the bar, the picture being drawn, the answer being written; and interrupting."""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ming_univision.ming_core import Conversation, Solver
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.nodes.saved_files import saved_files

PICTURE_TOKENS = 16  # of the small checkpoint


class Interrupted(BaseException):
    """As ComfyUI's own: no `except Exception` stops it."""


class FakeComfy:
    """The parts of ComfyUI that a running node calls, with a record of the calls."""

    def __init__(self):
        self.bars, self.texts = [], []  # (value, total, preview) a call; (text, node id, client)
        self.stop_after = None
        self.sockets, self.client_id = {"browser": object()}, "browser"
        fake = self

        class ProgressBar:
            def __init__(self, total):
                fake.bars.append([])

            def update_absolute(self, value, total, preview=None):
                fake.bars[-1].append((value, total, preview))

        self.utils = SimpleNamespace(ProgressBar=ProgressBar)
        self.model_management = SimpleNamespace(
            throw_exception_if_processing_interrupted=self._interrupted,
            intermediate_device=lambda: torch.device("cpu"),
        )
        method = SimpleNamespace(NoPreviews="none", Auto="auto")
        self.cli_args = SimpleNamespace(
            LatentPreviewMethod=method, args=SimpleNamespace(preview_method=method.Auto, preview_size=256)
        )

    def send_progress_text(self, text, node, client):
        self.texts.append((text, node, client))

    def _interrupted(self):
        if self.stop_after is not None and sum(map(len, self.bars)) >= self.stop_after:
            raise Interrupted


@pytest.fixture
def comfy(monkeypatch):
    fake = FakeComfy()
    context = SimpleNamespace(get_executing_context=lambda: SimpleNamespace(node_id="7"))
    monkeypatch.setattr(host, "comfy", fake)
    monkeypatch.setattr(host, "_nodes_with_text", set())
    monkeypatch.setattr(host, "comfy_execution", SimpleNamespace(utils=context))
    server = SimpleNamespace(PromptServer=SimpleNamespace(instance=fake))
    monkeypatch.setitem(sys.modules, "server", server)
    return fake


@pytest.fixture
def loaded(model):
    return host.Loaded(model, None, "small")


def run(node: str, **inputs):
    cls = NODE_CLASS_MAPPINGS[node]
    declared = cls.INPUT_TYPES()["required"]
    defaults = {name: o[1]["default"] for name, o in declared.items() if len(o) > 1 and "default" in o[1]}
    with torch.inference_mode():
        return getattr(cls(), cls.FUNCTION)(**(defaults | {"steps": 2} if "steps" in defaults else defaults) | inputs)


def moves(bar):
    """Checks that the bar moves with every call and never back; returns its last (value, total)."""
    shares = [value / total for value, total, _ in bar]
    assert [value for value, _, _ in bar] == list(range(1, len(bar) + 1))
    assert all(a <= b for a, b in itertools.pairwise(shares)) and shares[-1] <= 1
    return bar[-1][:2]


def test_the_bar_moves_with_every_token_of_an_answer_and_the_answer_shows_on_the_node(comfy, loaded):
    text, conversation = run("MingUnderstand", model=loaded, prompt="Hello.", max_new_tokens=9)
    emitted = conversation.parts[-1].length + 1
    assert moves(comfy.bars[0]) == (emitted, 9)
    texts = [t for t, _, _ in comfy.texts]
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    shown, node_id, client = comfy.texts[-1]
    assert shown.split("\n\n")[0] == text.strip() and (node_id, client) == ("7", "browser")


def test_a_node_says_what_the_user_may_not_expect_of_its_round(comfy, loaded, picture):
    def shown(**inputs):
        comfy.texts.clear()
        text, *_ = run("MingUnderstand", model=loaded, prompt="Hello.", max_new_tokens=3, **inputs)
        return comfy.texts[-1][0].removeprefix(text)

    alone, seen = shown(), shown(features=picture)
    assert "No picture is in view" in alone and "No picture" not in seen
    assert "cut off at max_new_tokens" in alone and "One message" not in seen
    both = picture._replace(tokens=picture.tokens.repeat(2, 1, 1), latents=picture.latents.repeat(2, 1, 1, 1))
    assert "One message about all 2 pictures" in shown(features=both)
    engine = loaded.model
    first = engine.understand(Conversation(), "Hello.", features=picture, max_new_tokens=1).token_ids[0]
    head = engine.network.language_model.lm_head.weight.data
    head[engine.config.llm_config.eos_token_id] = 2 * head[first]  # now the answer ends before it begins
    comfy.texts.clear()
    text, _ = run("MingUnderstand", model=loaded, prompt="Hello.", features=picture, max_new_tokens=3)
    assert text == "" and not any(sent.strip() for sent, _, _ in comfy.texts)


def test_markup_in_a_text_reaches_the_page_as_text(comfy):
    host.show_text("a <b> & <img src=x onerror=alert(1)>")
    assert comfy.texts == [("a &lt;b&gt; &amp; &lt;img src=x onerror=alert(1)&gt;", "7", "browser")]


def test_the_text_of_an_earlier_run_is_taken_off_the_node(comfy):
    host.show_text("An answer.", "MingUnderstand")
    comfy.texts.clear()
    host.progress(1)
    host.progress(1, "MingEdit")  # 7 is another node in this workflow, and a text would open a box on it
    assert not comfy.texts
    host.progress(1, "MingUnderstand")
    assert comfy.texts == [(" ", "7", "browser")]
    host.progress(1, "MingUnderstand")
    assert len(comfy.texts) == 1


def test_a_text_that_grows_is_sent_now_and_then_and_whole_at_the_end(comfy, loaded, monkeypatch):
    monkeypatch.setattr(host, "TEXT_INTERVAL", 3600)
    text, _ = run("MingUnderstand", model=loaded, prompt="Hello.", max_new_tokens=9)
    sent = [sent for sent, _, _ in comfy.texts]
    assert len(sent) == 2 and sent[-1].startswith(text)


@pytest.mark.parametrize(
    ("bf16", "fp16", "chosen"),
    [(True, True, torch.bfloat16), (False, True, torch.float16), (False, False, torch.float32)],
)
def test_a_gpu_computes_in_the_16_bits_that_comfyui_finds_good_for_it_or_in_32(comfy, bf16, fp16, chosen):
    comfy.model_management.should_use_bf16 = lambda on: bf16
    comfy.model_management.should_use_fp16 = lambda on: fp16
    assert host.half_dtype(torch.device("cuda")) == chosen
    assert host.half_dtype(torch.device("cpu")) == torch.bfloat16


def test_loading_a_conversation_moves_a_bar_and_can_be_stopped(comfy, loaded, tmp_path):
    conversation = Conversation()
    for _ in range(2):
        _, (conversation,), _ = run("MingGenerate", model=loaded, prompt="A cat.", conversation=conversation)
    with host.folders(output=tmp_path, input=tmp_path / "input"):
        run("MingSaveConversation", conversation=conversation)
        (name,) = saved_files()
        comfy.bars.clear()
        assert run("MingLoadConversation", model=loaded, file=name) == (conversation,)
        assert [(value, total) for value, total, _ in comfy.bars[0]] == [(1, 2), (2, 2)]
        comfy.bars.clear()
        comfy.stop_after = 1
        with pytest.raises(Interrupted):
            run("MingLoadConversation", model=loaded, file=name)


def test_the_bar_moves_with_every_token_of_a_picture_and_of_the_text_after_it(comfy, loaded):
    run("MingGenerate", model=loaded, prompt="A cat.", max_new_tokens=5)
    value, total = moves(comfy.bars[0])
    assert value == total and value >= PICTURE_TOKENS + 1
    assert comfy.bars[0][0][1] == PICTURE_TOKENS + 1


@pytest.fixture
def batch(loaded):
    """A MingTok and twenty pictures."""
    mingtok = host.Loaded(loaded.model.mingtok, None, "small: MingTok", owner=loaded)
    pictures = torch.rand(20, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    return mingtok, pictures


def test_a_batch_is_computed_a_few_pictures_at_a_time_and_is_what_it_would_be_one_by_one(comfy, batch):
    mingtok, pictures = batch
    latent, _ = run("MingTokEncode", mingtok=mingtok, image=pictures)
    (features,) = run("MingTokSemanticFeatures", mingtok=mingtok, latent=latent)
    (images,) = run("MingTokDecode", mingtok=mingtok, features=features)
    assert [[value for value, _, _ in bar] for bar in comfy.bars] == [[8, 16, 20]] * 3
    for i in (0, 7, 8, 19):
        single, _ = run("MingTokEncode", mingtok=mingtok, image=pictures[i : i + 1])
        (one,) = run("MingTokSemanticFeatures", mingtok=mingtok, latent=single)
        torch.testing.assert_close(features.split()[i].latents, one.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features.split()[i].tokens, one.tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(images[i : i + 1], run("MingTokDecode", mingtok=mingtok, features=one)[0])
    (large,) = run("MingTokDecode", mingtok=mingtok, features=features, enlarge_to=128)
    assert large.shape == (20, 128, 128, 3) and images.shape[1] < 128


@pytest.mark.parametrize("node", ["MingTokEncode", "MingTokSemanticFeatures", "MingTokDecode"])
def test_a_large_batch_can_be_stopped_in_between(comfy, batch, node):
    mingtok, pictures = batch
    latent, _ = run("MingTokEncode", mingtok=mingtok, image=pictures)
    (features,) = run("MingTokSemanticFeatures", mingtok=mingtok, latent=latent)
    given = {"MingTokEncode": {"image": pictures}, "MingTokSemanticFeatures": {"latent": latent}}
    comfy.bars.clear()
    comfy.stop_after = 1
    with pytest.raises(Interrupted):
        run(node, mingtok=mingtok, **given.get(node, {"features": features}))
    assert [value for value, _, _ in comfy.bars[0]] == [8]


def test_the_bar_moves_with_every_token_when_the_model_decides(comfy, loaded, monkeypatch):
    scripted = iter([4, 9, loaded.model.config.llm_config.image_start_token])
    end = loaded.model.config.llm_config.eos_token_id
    language_model = type(loaded.model.network.language_model)
    logits = language_model.logits

    def scripted_logits(self, hidden):
        out = torch.zeros_like(logits(self, hidden))
        out[:, next(scripted, end)] = 1
        return out

    monkeypatch.setattr(language_model, "logits", scripted_logits)
    run("MingGenerate", model=loaded, prompt="A cat.", start="model decides", max_new_tokens=8)
    assert moves(comfy.bars[0]) == (3 + PICTURE_TOKENS + 1,) * 2


def test_the_picture_shows_as_it_is_drawn_grey_where_nothing_is_yet(comfy, loaded):
    mingtok = loaded.model.mingtok
    decodes = mingtok.calls["decode"]
    features, _, _ = run("MingGenerate", model=loaded, prompt="A cat.", batch_size=2, max_new_tokens=1)
    shown = [(value, preview) for value, _, preview in comfy.bars[0] if preview]
    assert [value for value, _ in shown] == [4, 8, 12, 16] and mingtok.calls["preview"] == 4
    assert mingtok.calls["decode"] == decodes
    kind, first, side = shown[0][1]
    assert (kind, side, first.size, first.mode) == ("JPEG", 256, (32, 32), "RGB")
    assert first.getpixel((31, 17)) in ((127,) * 3, (128,) * 3) and len(first.crop((0, 0, 32, 8)).getcolors()) > 1
    with torch.no_grad():
        whole = mingtok.decode(features[0])[0]
    last = torch.from_numpy(np.array(shown[-1][1][1])).permute(2, 0, 1)
    difference = (last - (whole * 127.5 + 127.5)).abs()
    assert difference[:, :16].max() <= 1 < difference[:, 16:].max()  # below, it says that it is a preview


@pytest.mark.parametrize("reason", ["switched off", "nobody", "gone"])
def test_no_preview_is_made_when_it_is_switched_off_or_nobody_looks(comfy, loaded, reason):
    if reason == "switched off":
        comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.NoPreviews
    elif reason == "nobody":
        comfy.client_id = None
    else:
        comfy.sockets.clear()
    run("MingGenerate", model=loaded, prompt="A cat.", max_new_tokens=1)
    assert loaded.model.mingtok.calls["preview"] == 0
    assert not any(preview for _, _, preview in comfy.bars[0])
    assert comfy.texts == [] or reason == "switched off"


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupt_stops_at_the_next_token_and_leaves_everything_as_it_was(comfy, loaded, after):
    model = loaded.model
    before = model.understand(Conversation(), "Hello.", max_new_tokens=4).conversation
    expected = model.generate_image(before, "A cat.", solver=Solver(2), max_new_tokens=4)
    model.prefix_cache.clear()
    comfy.stop_after = after
    with pytest.raises(Interrupted):
        run("MingGenerate", model=loaded, prompt="A cat.", conversation=before, max_new_tokens=4)
    assert len(comfy.bars[-1]) == after
    comfy.stop_after = None
    features, _, _ = run("MingGenerate", model=loaded, prompt="A cat.", conversation=before, max_new_tokens=4)
    torch.testing.assert_close(features[0].latents, expected.features.latents, rtol=0, atol=3e-4)


@pytest.mark.parametrize(("device", "kept"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_weights_that_rest_on_the_gpu_take_none_of_the_ram_that_kept_models_may(comfy, monkeypatch, device, kept):
    on = torch.device(device)  # loaded and unloaded alike, as with --highvram and on a CPU
    patcher = SimpleNamespace(load_device=on, offload_device=on, model_size=lambda: 100, loaded_size=lambda: 100)
    entry = SimpleNamespace(model=patcher, ming_model=host.Loaded(None, patcher, "large"))
    comfy.model_management.current_loaded_models = [entry]
    monkeypatch.setattr(host, "host_memory", lambda: 100)
    host.make_room(0)
    assert hasattr(entry, "ming_model") == kept
