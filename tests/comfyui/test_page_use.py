"""What people do on ComfyUI's page: bypass, mute, make a subgraph, drop, search, interrupt, use two tabs, translate."""

from __future__ import annotations

import base64
import re

import pytest
from ming_univision.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ming_univision.tests.comfyui.browser import OPEN_DIALOGS, PageError, open_workflow

CHAIN = "multi_round_edit"
BYPASS, MUTE = 4, 2  # modes of a node
OFFERED = "[...document.querySelectorAll('.litecontextmenu, [role=menu], [role=dialog]')]"
SEARCH = "document.querySelector('input[placeholder^=\"Add a node\"]')"
NAMES_EVERYWHERE = {"Ming LoRA", "MingTok", "PSNR", "SSIM", "top_p", "Top P", "Latent"}
ONE_MORE = "Object.keys(await (await fetch('/history')).json()).some(i => !known.includes(i))"
# What the page says of any subgraph with a node of core that has a text box, or with a reroute before it.
CORES_OWN_ERRORS = {"Missing Link ID when unpacking", "Broken Id link when unpacking"}
DRAW = 3  # the node of text_to_image that draws


def exported(page) -> dict:
    return page.evaluate("return (await app.graphToPrompt()).output")


def edits(page) -> list[int]:
    """Ids of the edits of a chain, in its order."""
    return [int(i) for i in page.evaluate("return app.graph.nodes.filter(n => n.type === 'MingEdit').map(n => n.id)")]


def open_chain(page) -> None:
    """The chain with few steps, so that it runs soon."""
    open_workflow(page, CHAIN)
    for node in edits(page):
        set_widget(page, node, "steps", 1)


def set_mode(page, node: int, mode: int) -> None:
    page.evaluate("app.graph.getNodeById(node).mode = mode", node=node, mode=mode)


def set_widget(page, node: int, name: str, value: object) -> None:
    widget = "app.graph.getNodeById(node).widgets.find(w => w.name === name)"
    page.evaluate(f"{widget}.value = value", node=node, name=name, value=value)


def queued(page, server) -> dict:
    """Queue the page's workflow, and wait for its history entry."""
    known = set(server.get("/history"))
    page.evaluate("await app.queuePrompt(0, 1)")
    page.wait_for(ONE_MORE, known=sorted(known))
    (entry,) = [entry for prompt_id, entry in server.get("/history").items() if prompt_id not in known]
    return entry


def shape(prompt: dict, node: str) -> tuple:
    """A node with all that it depends on, without ids, which differ in a subgraph."""
    inputs = prompt[node]["inputs"]
    return prompt[node]["class_type"], tuple(
        (name, (shape(prompt, value[0]), value[1]) if isinstance(value, list) else value)
        for name, value in sorted(inputs.items())
    )


def shapes(prompt: dict) -> list[tuple]:
    return sorted((shape(prompt, node) for node in prompt), key=repr)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_chain_with_a_bypassed_edit_runs_what_comes_in_goes_out(page, rendering, server, which):
    open_chain(page)
    bypassed = edits(page)[which]
    set_mode(page, bypassed, BYPASS)
    assert str(bypassed) not in exported(page)
    done = queued(page, server)
    assert done["status"]["status_str"] == "success"
    assert [image for output in done["outputs"].values() for image in output.get("images", ())]
    assert page.errors == []


def test_a_muted_edit_is_an_error_on_the_next_one_which_says_what_to_connect(page, rendering, server):
    open_chain(page)
    set_mode(page, edits(page)[0], MUTE)
    status, answer = server.post("/prompt", {"prompt": exported(page)})
    assert status == 200
    messages = dict(server.finished(answer["prompt_id"])["status"]["messages"])
    error = messages["execution_error"]
    assert error["node_id"] == str(edits(page)[1])
    assert error["exception_message"].startswith("features: there is no picture to edit")
    assert page.errors == []


def test_a_chain_made_a_subgraph_and_unpacked_is_the_same_workflow(page, rendering, server):
    open_chain(page)
    before = exported(page)
    page.evaluate("""
        const chain = app.graph.nodes.filter(n => n.type === 'MingEdit');
        app.graph.convertToSubgraph(new Set(chain));""")
    assert shapes(exported(page)) == shapes(before)
    assert queued(page, server)["status"]["status_str"] == "success"
    try:
        page.evaluate("app.graph.unpackSubgraph(app.graph.nodes.find(n => n.isSubgraphNode?.()))")
    except PageError as error:
        if "Broken Id link when unpacking" not in str(error):
            raise
        pytest.skip("this ComfyUI cannot unpack a subgraph that a wire enters by a reroute")
    assert shapes(exported(page)) == shapes(before)
    assert set(page.errors) <= CORES_OWN_ERRORS


def test_a_saved_picture_dropped_on_the_page_brings_its_workflow_back(page, rendering, server):
    open_workflow(page, "text_to_image")
    set_widget(page, DRAW, "seed", 301 + len(rendering))
    before = exported(page)
    ((image,),) = [output["images"] for output in queued(page, server)["outputs"].values() if "images" in output]
    page.evaluate("await app.loadGraphData({version: 0.4, nodes: [], links: []})")
    page.evaluate(
        """
        const bytes = Uint8Array.from(atob(picture), letter => letter.charCodeAt(0));
        const dropped = new DataTransfer();
        dropped.items.add(new File([bytes], 'picture.png', {type: 'image/png'}));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer: dropped, bubbles: true, cancelable: true}));""",
        picture=base64.b64encode(server.fetch("/view", **image)).decode(),
    )
    page.wait_for("app.graph.nodes.length > 3")
    assert shapes(exported(page)) == shapes(before)


@pytest.mark.parametrize(
    ("node", "output", "expected"),
    [("MingGenerate", 0, "MingTokDecode"), ("MingGenerate", 1, "MingConversationTranscript"),
     ("MingUniVisionLoader", 0, "MingUnderstand"), ("MingUniVisionLoader", 1, "MingTokEncode")],
    ids=["features", "conversation", "model", "mingtok"],
)  # fmt: skip
def test_a_link_dropped_on_the_canvas_offers_our_nodes(page, rendering, node, output, expected):
    open_workflow(page, "text_to_image")
    start = page.evaluate(
        """
        await new Promise(done => setTimeout(done, 500));
        const [x, y] = app.graph.nodes.find(n => n.type === node).getOutputPos(output), view = app.canvas.ds;
        const {left, top} = app.canvas.canvas.getBoundingClientRect();
        return [(x + view.offset[0]) * view.scale + left, (y + view.offset[1]) * view.scale + top];""",
        node=node,
        output=output,
    )
    page.drag(tuple(start), (start[0] + 60, start[1] + 300))
    page.wait_for(f"{OFFERED}.some(menu => menu.innerText.includes(node))", node=expected)
    page.evaluate(f"{OFFERED}.filter(menu => menu.matches('.litecontextmenu')).forEach(menu => menu.remove())")


def test_search_finds_our_nodes_by_alias(page, rendering, server):
    offered = server.get("/object_info")
    if "search_aliases" not in offered["MingUnderstand"]:
        pytest.skip("this ComfyUI knows no aliases")
    page.evaluate("await app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for(SEARCH)
    for node_id in ("MingUnderstand", "MingGenerate", "MingEdit", "MingTokDecode", "MingImageMetrics"):
        title, alias = NODE_DISPLAY_NAME_MAPPINGS[node_id], offered[node_id]["search_aliases"][-1]
        page.evaluate(f"{SEARCH}.focus(); {SEARCH}.select()")
        page.write(alias)
        options = "[...document.querySelectorAll('[role=option]')].map(option => option.innerText)"
        page.wait_for(f"{options}.some(option => option.startsWith(title))", title=title)
    page.press("Escape")


def test_the_picture_is_seen_on_its_node_while_it_is_drawn_and_an_interrupt_lets_the_next_one_run(
    page, rendering, server
):
    open_workflow(page, "text_to_image")
    set_widget(page, DRAW, "seed", 302 + len(rendering))
    set_widget(page, DRAW, "steps", 64)
    known = sorted(server.get("/history"))
    page.evaluate("await app.queuePrompt(0, 1)")
    seen = "[...document.querySelectorAll('[data-node-id=\"3\"] img')].some(i => i.naturalWidth > 31)"
    drawn = "app.graph.getNodeById(3).imgs?.length"
    page.wait_for(seen if rendering == "Nodes 2.0" else drawn)
    page.evaluate("await app.extensionManager.command.execute('Comfy.Interrupt')")
    page.wait_for(ONE_MORE, known=known)
    (stopped,) = [entry for prompt_id, entry in server.get("/history").items() if prompt_id not in known]
    assert "execution_interrupted" in [kind for kind, _ in stopped["status"]["messages"]]
    set_widget(page, DRAW, "steps", 2)
    assert queued(page, server)["status"]["status_str"] == "success"
    assert page.evaluate(f"return {OPEN_DIALOGS}.map(d => d.innerText)") == []


def test_a_workflow_open_in_two_tabs_shows_each_its_own_answer(page, rendering, server):
    answers = {}
    for tab, scene in (("one", "a large red circle at the left"), ("two", "a small blue star at the right")):
        open_workflow(page, "describe")
        set_widget(page, 2, "scene", f"{scene} on a white background")
        done = queued(page, server)
        (answers[tab],) = done["outputs"]["7"]["text"]
        page.wait_for(
            "app.graph.getNodeById(6).widgets.some(w => String(w.value).includes(answer))", answer=answers[tab]
        )
    assert answers["one"] != answers["two"]
    tabs = page.evaluate("return app.extensionManager.workflow.openWorkflows.length")
    assert tabs >= 2 and page.errors == []


@pytest.fixture(scope="module")
def chinese_page(page, server):  # to the end of this file: opening takes long
    open_in(page, server, "zh")
    yield page
    open_in(page, server, "en")


def open_in(page, server, language: str) -> None:
    server.post("/settings", {"Comfy.Locale": language})
    page.open(server.url)
    page.wait_for("window.app?.graph && window.app.extensionManager && document.querySelector('canvas')")
    page.wait_until_quiet()  # by then the page has brought back the workflow that was open


def in_english(texts: list[str]) -> set[str]:
    """Those without a Chinese character; names that are the same in every language left out."""
    return {text for text in texts if text and not re.search("[\u4e00-\u9fff]", text) and text not in NAMES_EVERYWHERE}


def test_on_a_chinese_page_no_text_of_our_nodes_is_left_in_english(chinese_page):
    texts = chinese_page.evaluate(
        """
        const found = {};
        for (const id of ids) {
            const node = LiteGraph.createNode(id);
            const name = thing => thing.label ?? thing.localized_name ?? thing.name;
            const shown = [node.title, ...node.inputs.map(name), ...node.outputs.map(name)];
            const widgets = (node.widgets ?? []).filter(
                w => !w.name.startsWith('$$') && w.name !== 'control_after_generate');  // core's own
            found[id] = [...shown, ...widgets.flatMap(w => [w.label ?? w.name, w.tooltip ?? ''])];
        }
        return found;""",
        ids=list(NODE_CLASS_MAPPINGS),
    )
    assert {node_id: left for node_id, shown in texts.items() if (left := in_english(shown))} == {}


def test_on_a_chinese_page_the_templates_speak_chinese(chinese_page, rendering, name):
    open_workflow(chinese_page, name)
    texts = chinese_page.evaluate(
        """
        const notes = app.graph.nodes.filter(n => n.type === 'MarkdownNote').map(n => n.widgets[0].value);
        return [...app.graph.groups.map(g => g.title), ...app.graph.nodes.map(n => n.title), ...notes];"""
    )
    assert in_english(texts) == set()
    assert chinese_page.errors == []


def errors_of(page, server) -> tuple[str, str]:
    """Queue a round whose prompt is empty, which is found before the run, and then one with nothing to edit."""
    open_workflow(page, "text_to_image")
    set_widget(page, DRAW, "prompt", " ")
    page.evaluate("await app.queuePrompt(0, 1)")
    found = page.evaluate("return JSON.stringify(app.lastNodeErrors)")
    open_workflow(page, CHAIN)
    set_mode(page, edits(page)[0], MUTE)
    run = queued(page, server)
    return found, dict(run["status"]["messages"])["execution_error"]["exception_message"]


def test_errors_come_in_the_language_of_the_page_also_after_it_has_changed(chinese_page, rendering, server):
    checked, run = errors_of(chinese_page, server)
    assert "提示词是空的：请写上要模型做什么" in checked
    assert run.startswith("features：没有可编辑的图像；请连接「MingTok 语义特征」")
    answer = server.post("/prompt", {"prompt": exported(chinese_page)})[1]  # of a program, which has no language
    failed = dict(server.finished(answer["prompt_id"])["status"]["messages"])["execution_error"]
    assert failed["exception_message"].startswith("features: there is no picture to edit")
    chinese_page.evaluate("await app.extensionManager.setting.set('Comfy.Locale', 'en')")
    chinese_page.wait_until_quiet()
    checked, run = errors_of(chinese_page, server)
    assert "the prompt is empty" in checked
    assert run.startswith("features: there is no picture to edit")
    open_in(chinese_page, server, "zh")
