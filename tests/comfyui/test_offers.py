"""ComfyUI loads the pack: it imports, its nodes and templates are offered, and every workflow runs."""

from __future__ import annotations

import io
import json

from ming_univision.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from ming_univision.tests.comfyui.finding import PACK
from PIL import Image

CONFIG = json.loads((PACK / "models" / "tiny-shapes" / "config.json").read_text(encoding="utf-8"))
SIDE = CONFIG["mingtok_config"]["low_level_encoder"]["img_size"]


def test_the_server_starts_and_imports_the_pack_without_an_error(server):
    for problem in ("IMPORT FAILED", "Cannot import", "Traceback"):
        assert problem not in server.startup_log
    assert f"custom_nodes/{PACK.name}" in server.startup_log.replace("\\", "/")  # in its list of import times


def test_exactly_our_nodes_are_offered_under_their_names_with_their_sockets(server):
    offered = server.get("/object_info")
    ours = {i: node for i, node in offered.items() if node["python_module"] == f"custom_nodes.{PACK.name}"}
    assert set(ours) == set(NODE_CLASS_MAPPINGS)
    for node_id, node in ours.items():
        declared = NODE_CLASS_MAPPINGS[node_id]
        assert node["display_name"] == NODE_DISPLAY_NAME_MAPPINGS[node_id]
        assert tuple(node["output"]) == tuple(declared.RETURN_TYPES)
        for group, inputs in declared.INPUT_TYPES().items():
            assert list(node["input"][group]) == list(inputs)
            sockets = {name: kind for name, (kind, *_) in inputs.items() if isinstance(kind, str)}
            assert {name: node["input"][group][name][0] for name in sockets} == sockets


def test_help_pages_and_translations_are_served(server):
    for node_id in NODE_CLASS_MAPPINGS:
        for language in ("en", "zh"):
            page = server.fetch(f"/extensions/{PACK.name}/docs/{node_id}/{language}.md")
            assert page.strip() == (PACK / "web" / "docs" / node_id / f"{language}.md").read_bytes().strip()
    translated = server.get("/i18n")
    assert all(set(NODE_CLASS_MAPPINGS) <= set(translated[language]["nodeDefs"]) for language in ("en", "zh"))


def test_the_template_is_served_with_its_thumbnail(server, name):
    assert name in server.get("/workflow_templates")[PACK.name]
    served = f"/api/workflow_templates/{PACK.name}/{name}"
    assert server.get(f"{served}.json")["nodes"]
    with Image.open(io.BytesIO(server.fetch(f"{served}.jpg"))) as thumbnail:
        assert thumbnail.format == "JPEG" and min(thumbnail.size) >= 128


def test_the_workflow_runs_on_the_built_in_model_with_an_empty_input_folder(server, workflow, name):
    assert not [file for file in (server.base / "input").rglob("*") if file.is_file()]
    prompt = workflow(name)
    done = server.succeed(prompt)
    for node_id, node in prompt.items():
        if node["class_type"] in ("SaveImage", "PreviewImage"):
            for saved in done.outputs[node_id]["images"]:
                with Image.open(io.BytesIO(server.fetch("/view", **saved))) as image:
                    assert (image.format, image.size) == ("PNG", expected_size(prompt, node_id))
        elif node["class_type"] == "PreviewAny":
            assert done.outputs[node_id]["text"][0].strip()
        elif node["class_type"].startswith("MingSave"):
            number = "" if node["inputs"].get("overwrite") else "_0*"
            name = f"{node['inputs']['filename_prefix']}{number}.safetensors"
            assert list((server.base / "output" / "ming").glob(name))


def expected_size(prompt: dict, node_id: str) -> tuple[int, int]:
    """The width and height of what a node shows, by where it comes from."""
    inputs = prompt[node_id]["inputs"]
    source = next(inputs[socket] for socket in ("images", "image", "destination") if socket in inputs)[0]
    kind, given = prompt[source]["class_type"], prompt[source]["inputs"]
    if kind in ("ImageScale", "ImageCrop"):
        return given["width"], given["height"]
    if kind == "ImagePadForOutpaint":
        width, height = expected_size(prompt, source)
        return width + given["left"] + given["right"], height + given["top"] + given["bottom"]
    if kind == "ImageCompositeMasked":
        return expected_size(prompt, source)
    if kind == "MingExampleScene":
        return given["size"], given["size"]
    if kind == "MaskToImage":  # of a region: every token is shown as a square
        return 512, 512
    assert kind == "MingTokDecode"
    return (max(SIDE, given["enlarge_to"]),) * 2
