"""ComfyUI's page in a real browser: templates are listed, open as saved, and run."""

from __future__ import annotations

from ming_univision.tests.comfyui.browser import OPEN_DIALOGS, open_workflow
from ming_univision.tests.comfyui.finding import PACK


def comparable(prompt: dict) -> dict:
    """Drop what depends on the version of ComfyUI: titles that are names of node types, and what PreviewAny shows.

    Some versions export the latter as an input, which none reads.
    """
    for node in prompt.values():
        if ": " not in node["_meta"]["title"]:
            del node["_meta"]
        if node["class_type"] == "PreviewAny":
            node["inputs"] = {"source": node["inputs"]["source"]}
    return prompt


def test_the_workflow_opens_whole_and_exports_the_one_for_the_queue(page, rendering, name, workflow):
    saved = open_workflow(page, name)
    missing = "app.graph.nodes.filter(n => n.has_errors || !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    assert page.evaluate(f"return {missing}") == []
    ids = page.evaluate("return app.graph.nodes.map(n => String(n.id))")
    assert sorted(ids) == sorted(str(node["id"]) for node in saved["nodes"])
    if rendering == "Nodes 2.0":
        page.wait_for("document.querySelectorAll('[data-node-id]').length === count", count=len(saved["nodes"]))
    exported = page.evaluate("return (await app.graphToPrompt()).output")
    assert comparable(exported) == comparable(workflow(name))
    assert page.evaluate(f"return {OPEN_DIALOGS}.map(d => d.innerText)") == []
    assert page.errors == []


def test_a_workflow_runs_from_the_page_and_its_answer_is_seen_on_the_node(page, rendering, server):
    open_workflow(page, "describe")
    seed = "app.graph.getNodeById(6).widgets.find(w => w.name === 'seed')"
    page.evaluate(f"{seed}.value = value", value=201 + len(rendering))  # differs per rendering, or the cache answers
    known = set(server.get("/history"))
    page.evaluate("await app.queuePrompt(0, 1)")
    finished = "Object.keys(await (await fetch('/history')).json()).some(i => !known.includes(i))"
    page.wait_for(finished, known=sorted(known))
    (done,) = [entry for prompt_id, entry in server.get("/history").items() if prompt_id not in known]
    assert done["status"]["status_str"] == "success"
    (answer,) = done["outputs"]["7"]["text"]
    page.wait_for("app.graph.getNodeById(6).widgets.some(w => String(w.value).includes(answer))", answer=answer)
    if rendering == "Nodes 2.0":
        page.wait_for("document.querySelector('[data-node-id=\"6\"]').innerText.includes(answer)", answer=answer)
    assert page.errors == []


def test_the_templates_are_listed_under_the_pack_with_their_pictures(page, server):
    page.errors.clear()
    page.evaluate("await app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    leaves = f"{OPEN_DIALOGS}.flatMap(d => [...d.querySelectorAll('*')]).filter(e => !e.children.length)"
    entry = f"{leaves}.find(e => e.innerText === name)"
    page.wait_for(entry, name=PACK.name)
    page.evaluate(f"{entry}.click()", name=PACK.name)
    # older pages list the first dozen, and more when they are scrolled
    down = f"{OPEN_DIALOGS}.flatMap(d => [...d.querySelectorAll('*')]).forEach(e => {{ e.scrollTop = e.scrollHeight }})"
    for name in server.get("/workflow_templates")[PACK.name]:
        page.wait_for(f"({down}, {OPEN_DIALOGS}.some(d => d.innerText.includes(name)))", name=name)
    page.wait_for(f"{OPEN_DIALOGS}.some(d => [...d.querySelectorAll('img')].some(i => i.naturalWidth > 127))")
    assert page.errors == []
