"""Every shipped workflow runs on the built-in model, and decodes no more than it has to."""

import json
import math
from collections import Counter

import pytest
import torch
from ming_univision.ming_core import MingTok
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.runner.session import run_workflow
from ming_univision.runner.workflow import read_workflow, with_image
from PIL import Image

FOLDER = host.PACK / "workflows" / "api"
CORE_NODES = {"LoadImage", "SaveImage", "PreviewImage", "PreviewAny", "LatentBlend", "ImageScale"}

# name: encodes, decodes, semantic decoder runs (those of drawn tokens not counted)
CALLS = {
    "reconstruct": (1, 1, 1),
    "describe": (1, 0, 1),
    "text_to_image": (0, 1, 0),
    "multi_round_edit": (1, 1, 1),
    "segment_then_edit": (1, 2, 1),
    "super_resolution_then_colorize": (1, 1, 1),
    "enhance_chain": (1, 1, 1),
    "branch_edits": (1, 2, 1),
    "draw_then_ask": (0, 1, 0),
    "text_chat": (0, 0, 0),
    "save_and_continue": (1, 1, 1),
}


def shortened(workflow: dict) -> dict:
    """Untrained or not, a model answers in a few tokens here, and draws in few steps."""
    for node in workflow.values():
        limits = {"max_new_tokens": 8, "steps": 2}
        node["inputs"] |= {k: v for k, v in limits.items() if k in node["inputs"]}
    return workflow


def test_all_workflows_are_here():
    assert {p.stem for p in FOLDER.glob("*.json")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_workflow_runs_and_encodes_and_decodes_exactly_as_often_as_it_must(name, tmp_path, monkeypatch):
    at_first_use = {}
    load_to_gpu = host.load_to_gpu

    def watched(handle, memory=0):
        assert torch.is_inference_mode_enabled()
        model = load_to_gpu(handle, memory)
        tok = model if isinstance(model, MingTok) else model.mingtok
        at_first_use.setdefault(tok, tok.calls.copy())
        return model

    monkeypatch.setattr(host, "load_to_gpu", watched)
    results = run_workflow(shortened(read_workflow(FOLDER / f"{name}.json")), output_dir=tmp_path)
    ((tok, before),) = at_first_use.items()
    encodes, decodes, semantic = CALLS[name]
    assert tok.calls - before == +Counter(encode=encodes, decode=decodes, semantic=semantic)
    saved = list(tmp_path.rglob("*.png"))
    assert len(saved) == decodes
    assert results


@pytest.mark.parametrize("name", CALLS)
def test_the_workflow_uses_our_nodes_and_few_of_cores_and_its_own_example(name):
    nodes = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")).values()
    types = [node["class_type"] for node in nodes]
    assert set(types) <= set(NODE_CLASS_MAPPINGS) | CORE_NODES and "LoadImage" not in types
    if CALLS[name][0]:
        assert types.count("MingExampleScene") == 1
    for node in nodes:
        declared = NODE_CLASS_MAPPINGS.get(node["class_type"])
        if declared:
            inputs = declared.INPUT_TYPES()
            assert set(inputs["required"]) <= set(node["inputs"])
            assert set(node["inputs"]) <= set(inputs["required"]) | set(inputs.get("optional", {}))
        assert node["_meta"]["title"]


@pytest.mark.parametrize("name", CALLS)
def test_the_workflow_for_the_page_has_the_same_nodes_and_every_seed_stays_fixed(name):
    api = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    page = json.loads((FOLDER.parent / f"{name}.json").read_text(encoding="utf-8"))
    nodes = {str(n["id"]): n for n in page["nodes"] if n["type"] != "MarkdownNote"}
    assert {i: n["type"] for i, n in nodes.items()} == {i: n["class_type"] for i, n in api.items()}
    assert any(n["type"] == "MarkdownNote" and n["widgets_values"][0] for n in page["nodes"])
    sources = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    for i, n in nodes.items():
        links = {s["name"]: sources[s["link"]] for s in n["inputs"] if s.get("link") is not None}
        assert links == {k: v for k, v in api[i]["inputs"].items() if isinstance(v, list)}
        widgets = n.get("widgets_values_named", {})
        for k, v in api[i]["inputs"].items():
            assert isinstance(v, list) or widgets[k] == v
        if "seed" in api[i]["inputs"] and n["type"] != "MingUnderstand":
            assert "fixed" in n["widgets_values"]


@pytest.mark.parametrize("name", [name for name, (encodes, *_) in CALLS.items() if encodes])
def test_a_photograph_of_any_shape_takes_the_scenes_place(name, tmp_path):
    Image.effect_noise((90, 60), 64).convert("RGB").save(tmp_path / "photo.jpg")
    workflow = with_image(shortened(read_workflow(FOLDER / f"{name}.json")), tmp_path / "photo.jpg")
    assert run_workflow(workflow, output_dir=tmp_path)


def test_reconstruct_reports_a_good_likeness(tmp_path):
    workflow = read_workflow(FOLDER / "reconstruct.json")
    results = run_workflow(workflow, output_dir=tmp_path)
    metrics = next(i for i, n in workflow.items() if n["class_type"] == "MingImageMetrics")
    (noise,), (structure,), (report,) = results[metrics].outputs
    assert math.isfinite(noise) and noise > 22 and structure > 0.8  # against the scene at 512, not at 128
    assert f"{noise:.2f} dB" in report
