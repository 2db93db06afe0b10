"""What saved workflows depend on: ids, sockets, widgets, their order, strings and defaults."""

import re

import pytest
from ming_univision.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, host
from ming_univision.nodes.models import BUILT_IN

MAX_SEED = 2**64 - 1
DRAWING = {
    "seed": ("INT", 0, 0, MAX_SEED),
    "batch_size": ("INT", 1, 1, 16),
    "text_guidance": ("FLOAT", 3.0, 0, 20),
    "steps": ("INT", 16, 1, 64),
    "temperature": ("FLOAT", 1.0, 0, 2),
    "solver": ["euler", "ab2", "data_ab2"],
    "start": ["draw now", "model decides"],
    "max_new_tokens": ("INT", 64, 1, 4096),
    "image_guidance": ("FLOAT", 1.1, 0, 10),
}


def drawing(first: str, *order: str) -> dict:
    return {"model": "MING_UNIVISION", first: ("STRING", "")} | {name: DRAWING[name] for name in order}


# id: display name, required inputs in order, optional inputs in order, outputs in order.
# A socket is its type; a number is (type, default, min, max); a combo its strings, the first of them the default.
NODES = {
    "MingTokLoader": (
        "Load MingTok",
        {"model_name": [BUILT_IN], "precision": ["auto", "fp32", "bf16", "fp16"]},
        {},
        {"mingtok": "MINGTOK"},
    ),
    "MingUniVisionLoader": (
        "Load Ming-UniVision",
        {"model_name": [BUILT_IN], "precision": ["auto", "bf16", "fp16", "fp32", "int8", "int4"]},
        {},
        {"model": "MING_UNIVISION", "mingtok": "MINGTOK"},
    ),
    "MingLoraLoader": (
        "Ming LoRA",
        {"model": "MING_UNIVISION", "lora_name": [], "strength": ("FLOAT", 1.0, -10, 10)},
        {},
        {"model": "MING_UNIVISION"},
    ),
    "MingExampleScene": (
        "Ming Example Scene",
        {
            "scene": ("STRING", ""),
            "seed": ("INT", 0, 0, MAX_SEED),
            "degrade": ["none", "pixelated", "grey", "noisy"],
            "size": ("INT", 512, 64, 1024),
        },
        {},
        {"image": "IMAGE", "caption": "STRING"},
    ),
    "MingTokEncode": (
        "MingTok Encode",
        {
            "mingtok": "MINGTOK",
            "image": "IMAGE",
            "fit": ["center crop", "stretch", "pad"],
            "detail": ["standard", "high"],
        },
        {"mask": "MASK"},
        {"latent": "LATENT", "mask": "MASK"},
    ),
    "MingTokSemanticFeatures": (
        "MingTok Semantic Features",
        {"mingtok": "MINGTOK", "latent": "LATENT"},
        {},
        {"features": "MING_FEATURES"},
    ),
    "MingTokDecode": (
        "MingTok Decode",
        {"mingtok": "MINGTOK", "features": "MING_FEATURES"},
        {"enlarge_to": "INT"},
        {"image": "IMAGE"},
    ),
    "MingUnderstand": (
        "Ming Understand",
        {
            "model": "MING_UNIVISION",
            "prompt": ("STRING", "Please describe the picture in detail."),
            "max_new_tokens": ("INT", 512, 1, 4096),
            "temperature": ("FLOAT", 0, 0, 2),
            "top_p": ("FLOAT", 1, 0.01, 1),
            "seed": ("INT", 0, 0, MAX_SEED),
        },
        {"features": "MING_FEATURES", "conversation": "MING_CONVERSATION"},
        {"text": "STRING", "conversation": "MING_CONVERSATION"},
    ),
    "MingGenerate": (
        "Ming Generate",
        drawing(
            "prompt",
            "seed",
            "batch_size",
            "text_guidance",
            "steps",
            "temperature",
            "solver",
            "start",
            "max_new_tokens",
            "image_guidance",
        ),
        {"conversation": "MING_CONVERSATION"},
        {"features": "MING_FEATURES", "conversation": "MING_CONVERSATION", "text": "STRING"},
    ),
    "MingEdit": (
        "Ming Edit",
        drawing(
            "instruction",
            "seed",
            "batch_size",
            "text_guidance",
            "image_guidance",
            "steps",
            "temperature",
            "solver",
            "start",
            "max_new_tokens",
        ),
        {"features": "MING_FEATURES", "conversation": "MING_CONVERSATION", "mask": "MASK"},
        {"features": "MING_FEATURES", "conversation": "MING_CONVERSATION", "text": "STRING"},
    ),
    "MingInstruction": (
        "Ming Instruction",
        {
            "task": [
                "generate",
                "describe",
                "identify region",
                "refine",
                "edit",
                "super-resolution",
                "denoise",
                "colorize",
            ],
            "text": ("STRING", ""),
        },
        {},
        {"instruction": "STRING"},
    ),
    "MingFeaturesPreview": ("Ming Features Preview", {"features": "MING_FEATURES"}, {}, {"image": "IMAGE"}),
    "MingFeaturesCompare": (
        "Ming Features Compare",
        {"features_a": "MING_FEATURES", "features_b": "MING_FEATURES", "threshold": ("FLOAT", 0.15, 0, 2)},
        {"mingtok": "MINGTOK"},
        {"heatmap": "IMAGE", "mask": "MASK", "similarity": "FLOAT"},
    ),
    "MingFeaturesBatch": (
        "Ming Features Batch",
        {"features_a": "MING_FEATURES", "features_b": "MING_FEATURES"},
        {},
        {"features": "MING_FEATURES"},
    ),
    "MingRegionMask": (
        "Ming Region Mask",
        {
            "features": "MING_FEATURES",
            "region": "MING_FEATURES",
            "threshold": ("FLOAT", 0.3, 0, 1),
            "grow": ("INT", 1, 0, 16),
        },
        {},
        {"mask": "MASK"},
    ),
    "MingFeaturesToLatent": ("Ming Features to Latent", {"features": "MING_FEATURES"}, {}, {"latent": "LATENT"}),
    "MingSaveFeatures": (
        "Ming Save Features",
        {"features": "MING_FEATURES", "filename_prefix": ("STRING", "features")},
        {},
        {},
    ),
    "MingLoadFeatures": ("Ming Load Features", {"file": []}, {}, {"features": "MING_FEATURES"}),
    "MingSaveConversation": (
        "Ming Save Conversation",
        {"conversation": "MING_CONVERSATION", "filename_prefix": ("STRING", "conversation")},
        {"overwrite": "BOOLEAN"},
        {},
    ),
    "MingLoadConversation": (
        "Ming Load Conversation",
        {"model": "MING_UNIVISION", "file": []},
        {},
        {"conversation": "MING_CONVERSATION"},
    ),
    "MingContinueConversation": (
        "Ming Continue Conversation",
        {"model": "MING_UNIVISION", "name": ("STRING", "chat")},
        {},
        {"conversation": "MING_CONVERSATION"},
    ),
    "MingConversationPicture": (
        "Ming Conversation Picture",
        {"conversation": "MING_CONVERSATION", "index": ("INT", -1, -1024, 1023)},
        {},
        {"features": "MING_FEATURES"},
    ),
    "MingConversationTranscript": (
        "Ming Conversation Transcript",
        {"conversation": "MING_CONVERSATION"},
        {},
        {"transcript": "STRING"},
    ),
    "MingConversationStoryboard": (
        "Ming Conversation Storyboard",
        {"mingtok": "MINGTOK", "conversation": "MING_CONVERSATION"},
        {},
        {"image": "IMAGE"},
    ),
    "MingImageMetrics": (
        "Ming Image Metrics",
        {"image_a": "IMAGE", "image_b": "IMAGE"},
        {},
        {"psnr": "FLOAT", "ssim": "FLOAT", "report": "STRING"},
    ),
}

SHOWN_ON_THE_NODE = {"MingConversationStoryboard"}
ADVANCED = {
    "MingUnderstand": {"top_p", "seed"},
    "MingGenerate": {"steps", "temperature", "solver", "start", "max_new_tokens", "image_guidance"},
    "MingEdit": {"steps", "temperature", "solver", "start", "max_new_tokens"},
}
SEED_CHANGES = {"MingUnderstand": False, "MingGenerate": True, "MingEdit": True, "MingExampleScene": True}


@pytest.fixture(autouse=True)
def empty_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "own_lora_folder", lambda: tmp_path)
    monkeypatch.setattr(host, "PACK_LORAS", tmp_path)
    with host.folders(output=tmp_path, input=tmp_path):
        yield


def simplified(declared: tuple):
    kind, options = declared
    if isinstance(kind, list):
        assert options.get("default", kind[0] if kind else None) == (kind[0] if kind else None)
        return kind
    if kind in ("INT", "FLOAT"):
        return (kind, options["default"], options["min"], options["max"])
    return (kind, options.get("default", "")) if kind == "STRING" else kind


def test_the_pack_has_exactly_these_nodes():
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS) == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_ids_sockets_widgets_orders_and_strings_are_the_published_ones(node_id):
    name, required, optional, outputs = NODES[node_id]
    node = NODE_CLASS_MAPPINGS[node_id]
    inputs = node.INPUT_TYPES()
    assert NODE_DISPLAY_NAME_MAPPINGS[node_id] == name
    assert {k: simplified(v) for k, v in inputs["required"].items()} == required
    assert list(inputs["required"]) == list(required)
    assert {k: v[0] for k, v in inputs.get("optional", {}).items()} == optional
    assert list(inputs.get("optional", {})) == list(optional)
    assert dict(zip(getattr(node, "RETURN_NAMES", ()), node.RETURN_TYPES, strict=True)) == outputs
    assert getattr(node, "OUTPUT_NODE", False) == (not outputs or node_id in SHOWN_ON_THE_NODE)


@pytest.mark.parametrize("node_id", NODES)
def test_every_input_and_output_has_a_tooltip_and_every_node_says_what_it_does(node_id):
    node = NODE_CLASS_MAPPINGS[node_id]
    for group in node.INPUT_TYPES().values():
        for name, (_, options) in group.items():
            assert re.search(r"\w.*[.]$", options["tooltip"]), name
    assert len(getattr(node, "OUTPUT_TOOLTIPS", ())) == len(node.RETURN_TYPES)
    assert node.DESCRIPTION and node.CATEGORY.split("/")[0] == "Ming-UniVision"
    assert node.CATEGORY in ("Ming-UniVision", "Ming-UniVision/features", "Ming-UniVision/tools")


@pytest.mark.parametrize("node_id", NODES)
def test_rare_widgets_are_folded_away_and_seeds_change_only_where_a_picture_is_drawn(node_id):
    inputs = NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"]
    advanced = {name for name, (_, options) in inputs.items() if options.get("advanced")}
    assert advanced == ADVANCED.get(node_id, set())
    if "seed" in inputs:
        assert inputs["seed"][1]["control_after_generate"] is SEED_CHANGES[node_id]


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_is_found_by_other_words_too(node_id):
    aliases = NODE_CLASS_MAPPINGS[node_id].SEARCH_ALIASES
    assert aliases and len(set(aliases)) == len(aliases)
    assert NODES[node_id][0].lower() not in aliases  # found without an alias


def test_loaded_models_have_a_short_repr():
    model, mingtok = NODE_CLASS_MAPPINGS["MingUniVisionLoader"]().load(BUILT_IN, "fp32")
    assert repr(model) == f"UniVision({BUILT_IN})" and repr(mingtok) == f"MingTok({BUILT_IN}: MingTok)"


@pytest.mark.parametrize("node_id", NODES)
def test_prompts_are_taken_literally(node_id):
    for _, options in NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"].values():
        if options.get("multiline"):
            assert options["dynamicPrompts"] is False


def test_only_the_drawing_nodes_give_lists():
    lists = {k for k, node in NODE_CLASS_MAPPINGS.items() if any(getattr(node, "OUTPUT_IS_LIST", ()))}
    assert lists == {"MingGenerate", "MingEdit"}
    for node_id in lists:
        assert NODE_CLASS_MAPPINGS[node_id].OUTPUT_IS_LIST == (True, True, True)


def test_the_published_phrasings_are_word_for_word():
    write = NODE_CLASS_MAPPINGS["MingInstruction"]().write
    assert write("generate", "A {cute} girl.") == (
        "Please generate the corresponding image based on the description. A {cute} girl.",
    )
    assert write("describe", "") == ("Please describe the picture in detail.",)
    assert write("identify region", "Make it red") == (
        "Given the edit instruction: Make it red, please identify the editing region",
    )
    assert write("refine", "") == ("Refine the image for better clarity.",)
    assert write("edit", "Make it red.") == ("Make it red.",)
