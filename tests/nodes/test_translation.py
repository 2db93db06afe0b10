"""Messages on a page in another language: every message of the code has a translation, and it reaches the page."""

import ast
import asyncio
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ming_univision.ming_core import Conversation
from ming_univision.ming_core.engine import EMPTY_PROMPT
from ming_univision.ming_core.offload import NonfiniteError, nonfinite_error
from ming_univision.ming_core.text_tokenizer import FETCH
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, lora, models
from ming_univision.nodes.inputs import SOURCES
from ming_univision.nodes.rounds import NO_PICTURE
from ming_univision.nodes.translation import MAX_LENGTH, translate_error, translated
from ming_univision.tests.conftest import ROOT
from ming_univision.tests.sources import nodes_of, text_of

RAISED = ("_HeaderFault", "_Damaged", "_CutOff", "_require")  # what raises messages, beside classes called ...Error
SENTENCE = re.compile(r"(?<![\w.])[a-z]+ [a-z]+ [a-z]+(?![\w.])")  # English that was left
# Messages that are put together of more than what is filled in: a template in the code -> one that users may see.
WHOLE = {
    "tensor {} {} {}": "tensor Q overlaps the header",
    "{}the weights are damaged, download them again": "the weights are damaged, download them again",
    "{} is {}: it must be{}": "Q is Q: it must be from 0 to 1",
    "{} is not valid JSON: {} at {}; {}": "Q is not valid JSON: Q at line Q, column Q; Q",
    "{}: {}": "Q is missing: download this file again",
    "{}: {}; correct it, or {}": "Q: Q is Q: it must be at least 1; correct it, or download this file again",
    "{}: according to the weights, {}: {}": "Q: according to the weights, Q: download the checkpoint again",
    "{}: {}{}; {}": "Q: the tokenizer has no special token Q: it belongs to another model (Q is missing); Q",
    "{} are {} {}": "tokens are Q Q",
    "{} {}": "filename_prefix 'a' contains a line break: remove it",
    "these features have different grids ({} tokens): encode both pictures with one detail; drawn pictures have that "
    "of detail `standard`": "these features have different grids (Q and Q tokens): encode both pictures with one "
    "detail; drawn pictures have that of detail `standard`",
    "an object cannot be at the {}: name one place for each object": "an object cannot be at the Q and the Q: name one "
    "place for each object",
}


def messages() -> list[str]:
    """The texts of all errors that nodes may show, with {} for what is filled in."""
    calls = [node for file in source_files() for node in nodes_of(file) if isinstance(node, ast.Call)]
    raised = [call for call in calls if name_of(call).endswith("Error") or name_of(call) in RAISED]
    return sorted({text for call in raised for text in map(text_of, call.args) if text and " " in text})


def source_files() -> list[Path]:
    """The code that runs in nodes."""
    core = [file for file in (ROOT / "ming_core").rglob("*.py") if "training" not in file.parts]
    world = [ROOT / "tiny_shapes" / "world" / name for name in ("descriptions.py", "scenes.py")]
    return [*(ROOT / "nodes").glob("*.py"), *core, *world]


def name_of(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


@pytest.mark.parametrize("message", [*messages(), NO_PICTURE, EMPTY_PROMPT, FETCH, *SOURCES.values()])
def test_every_message_of_the_code_is_translated_with_all_that_is_filled_in(message):
    shown = WHOLE.get(message) or re.sub(r"(?<=[a-wyz0-9}])\{\}", "", message).replace("{}", "Q")
    chinese = translated(shown, "zh")
    assert re.search("[\u4e00-\u9fff]", chinese), shown
    assert not SENTENCE.search(chinese), chinese
    assert chinese.count("Q") == shown.count("Q")


COMPOSED = [
    "/m/config.json: llm_config: hidden_size is 0: it must be at least 1; correct it, or download this file again",
    "/m/tokenizer.json: the tokenizer has no special token <x>: it belongs to another model; " + FETCH,
    "/m: according to the weights, width is 0: it must be at least 1: download the checkpoint again",
    "/m/a.safetensors is cut off in tensor a.b: 100 bytes of 5; download this file again",
    "/m/x.json is a folder, not a file: put the file in its place",
    "the folder's name 'a' contains half a character (a lone surrogate): type it again",
    "No region was found. Lower the threshold, or look at the drawn region with MingTok Decode.",
    "The region takes 25 % of the picture.",
    "(No picture is in view: this round is about the text alone.)",
    "(One message about all 2 pictures. A list instead of a batch makes a round of each.)",
    "the model computed NaN or infinite values in bfloat16: lower the strength of the LoRA a.safetensors, or leave it "
    "out; if that does not help, lower guidance and temperature if they are extreme; else the weights are damaged, "
    "download them again",
]


@pytest.mark.parametrize("message", COMPOSED)
def test_messages_in_messages_are_translated_to_their_last_word(message):
    assert not SENTENCE.search(translated(message, "zh"))


@pytest.mark.parametrize("system", ["posix", "nt"])
@pytest.mark.parametrize("kind", ["univision", "mingtok"])
def test_a_missing_model_is_explained_in_the_language_of_the_page(system, kind):
    message = models.missing_message("Ming 2", kind)
    if system == "nt" and os.name != "nt":
        message = message.replace('". Nothing', f'"{models.POWERSHELL}. Nothing')
    chinese = translated(message, "zh")
    assert chinese.startswith('没有找到模型 "Ming 2"') and not SENTENCE.search(chinese)
    assert chinese.count("https://") == 2 and "quickstart.py" in chinese
    assert not SENTENCE.search(translated(lora.missing_message("x"), "zh"))


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        # what somebody wrote may look like any part of a message
        (
            "'foo' was not understood in 'a red circle. a foo star? x'. Known shapes: circle; colors: red; sizes: "
            "small; positions: top; backgrounds: white. Example: a star.",
            "没有看懂 'a red circle. a foo star? x' 里的 'foo'。可用的形状：circle；颜色：red；大小：small；"
            "位置：top；背景：white。例如：a star.",
        ),
        (
            "filename_prefix 'cats and grid leads out of x' leads out of /out or is not a file name: use a name such "
            'as "cats" or "cats/first"',
            "filename_prefix 'cats and grid leads out of x' 指向 /out 之外，或者不是文件名："
            '请用 "cats" 或 "cats/first" 这样的名称',
        ),
        (
            "there is no file 'ming/cats in hats' in /out: save it first, or choose another one from the list",
            "/out 里没有文件 'ming/cats in hats'：请先保存，或从列表中选择另一个",
        ),
        ("seed is 'x': it must be a whole number from 0 to 9", "seed 是 'x'：它必须是 0 到 9 的整数"),
        (
            "features takes MING_FEATURES, and a list came: connect MingTok Semantic Features, Ming Generate or Ming "
            "Edit",
            "features 需要 MING_FEATURES，而接入的是 列表：请连接「MingTok 语义特征」「Ming 生成」或「Ming 编辑」",
        ),
        # a file is called as a message is: what somebody named stays
        ("cats and dogs.safetensors: no such file", "cats and dogs.safetensors：没有这个文件"),
        ("x is missing: download this file again", "缺少 x：请重新下载这个文件"),
        (
            'the model has not begun a picture in 8 tokens: "no picture". Raise max_new_tokens, or set start to "draw '
            'now" to have it draw',
            '模型写了 8 个 token 还没有开始画图："no picture"。请调高文字 token 上限（max_new_tokens），'
            '或把起始方式（start）改为 "draw now"',
        ),
    ],
)
def test_messages_come_with_what_is_filled_in_translated_where_it_is_known(english, chinese):
    assert translated(english, "zh") == chinese


@pytest.mark.parametrize("language", ["", "en", "fr", "../en", "zh-TW"])
def test_in_other_languages_messages_stay_english(language):
    assert translated("get it again", language) == "get it again"


def test_unknown_and_very_long_messages_stay_as_they_are_in_little_time():
    unknown = "CUDA out of memory. Tried to allocate 20 MiB"
    assert translated(unknown, "zh") == unknown
    for long in ("is: " * 900 + "x and y", "get it again" + " " * MAX_LENGTH):
        assert translated(long, "zh") == long


@pytest.fixture
def server(monkeypatch):
    """ComfyUI's server with one page, which has told its language."""
    handlers, routes = [], {}
    fake = SimpleNamespace(
        sockets={"page": object(), "other": object()},
        client_id="page",
        add_on_prompt_handler=handlers.append,
        routes=SimpleNamespace(post=lambda path: lambda handler: routes.setdefault(path, handler)),
        handlers=handlers,
    )
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=fake)))
    monkeypatch.setattr(host, "_page_languages", type(host._page_languages)())
    host.follow_page_languages()

    def tell(told):
        async def json():
            if isinstance(told, Exception):
                raise told
            return told

        return asyncio.run(routes[host.LANGUAGE_ROUTE](SimpleNamespace(json=json))).status

    fake.tell = tell
    monkeypatch.setitem(
        sys.modules,
        "aiohttp",
        SimpleNamespace(web=SimpleNamespace(Response=lambda status, text="": SimpleNamespace(status=status))),
    )
    return fake


def run(node: str, **inputs):
    cls = NODE_CLASS_MAPPINGS[node]
    return getattr(cls(), cls.FUNCTION)(**inputs)


def test_errors_of_a_run_come_in_the_language_of_the_page_that_queued_it(server):
    assert server.tell({"client": "page", "language": "zh"}) == 204
    with pytest.raises(ValueError, match="它必须是 -1024 到 1023 的整数") as error:
        run("MingConversationPicture", conversation=Conversation(), index=0.5)
    if sys.version_info >= (3, 11):
        assert error.value.__notes__ == ["index is 0.5: it must be a whole number from -1024 to 1023"]
    server.client_id = "other"  # another page, which is English
    with pytest.raises(ValueError, match="it must be a whole number"):
        run("MingConversationPicture", conversation=Conversation(), index=0.5)


def test_a_check_before_the_run_speaks_to_the_page_that_posts_the_prompt(server):
    server.tell({"client": "page", "language": "zh"})
    check = NODE_CLASS_MAPPINGS["MingGenerate"].VALIDATE_INPUTS
    said = {}

    async def post(client):
        """A request has a task of its own, while the prompt of another page may be running."""
        for handler in server.handlers:
            assert handler({"client_id": client, "prompt": {}}) == {"client_id": client, "prompt": {}}
        said[client] = check(prompt=" ")

    async def all_at_once():
        await asyncio.gather(*(asyncio.create_task(post(client)) for client in ("page", "other", None)))

    asyncio.run(all_at_once())  # that of the page is running
    english = "the prompt is empty: write what the model is to do"
    assert said == {"page": "提示词是空的：请写上要模型做什么", "other": english, None: english}


def test_an_error_keeps_its_type_and_what_it_carries(server):
    server.tell({"client": "page", "language": "zh"})
    error = nonfinite_error(torch.float16)
    translate_error(error)
    assert isinstance(error, NonfiniteError) and error.dtype == torch.float16
    assert str(error) == "模型在 float16 下算出了 NaN 或无穷大：请选择 fp32（或 bf16）"


@pytest.mark.parametrize("told", [ValueError("no JSON"), [], {"client": "page"}, None])
def test_what_is_no_language_is_refused(server, told):
    assert server.tell(told) == 400


def test_values_of_other_types_are_ignored_and_the_oldest_pages_forgotten(server, monkeypatch):
    monkeypatch.setattr(host, "MAX_PAGES", 2)
    for client in (1, "a", "page", "b"):
        assert server.tell({"client": client, "language": "zh"}) == 204
    assert list(host._page_languages) == ["page", "b"]
    assert host.page_language() == "zh"
    server.sockets.clear()  # the page is closed, or it is a program that uses the API
    assert host.page_language() == ""
