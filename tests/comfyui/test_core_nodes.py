"""The headless runner's versions of core's nodes make the same pictures as core's own."""

from __future__ import annotations

import io

import numpy as np
from ming_univision.runner.session import Session
from PIL import Image


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


# A photograph of any shape: a part of it is cut out, scaled to be edited (here, another scene stands for the edit),
# scaled back and put in its place inside a mask. And a picture that is extended.
PROMPT = {
    "scene": node("MingExampleScene", scene="", seed=1, degrade="none", size=200),
    "other": node("MingExampleScene", scene="", seed=2, degrade="none", size=128),
    "wide": node("ImageScale", image=["scene", 0], upscale_method="lanczos", width=300, height=170, crop="center"),
    "part": node("ImageCrop", image=["wide", 0], width=120, height=90, x=40, y=50),
    "size": node("GetImageSize", image=["part", 0]),
    "back": node(
        "ImageScale",
        image=["other", 0],
        upscale_method="bicubic",
        width=["size", 0],
        height=["size", 1],
        crop="disabled",
    ),
    "area": node("SolidMask", value=0.0, width=120, height=90),
    "spot": node("SolidMask", value=1.0, width=40, height=30),
    "painted": node("MaskComposite", destination=["area", 0], source=["spot", 0], x=30, y=20, operation="add"),
    "grown": node("GrowMask", mask=["painted", 0], expand=7, tapered_corners=True),
    "inverted": node("InvertMask", mask=["grown", 0]),
    "cut": node("CropMask", mask=["inverted", 0], x=10, y=10, width=90, height=70),
    "soft": node("FeatherMask", mask=["grown", 0], left=35, top=20, right=0, bottom=9),
    "edited": node(
        "ImageCompositeMasked",
        destination=["part", 0],
        source=["back", 0],
        x=0,
        y=0,
        resize_source=False,
        mask=["soft", 0],
    ),
    "whole": node(
        "ImageCompositeMasked", destination=["wide", 0], source=["edited", 0], x=40, y=50, resize_source=False
    ),
    "padded": node("ImagePadForOutpaint", image=["whole", 0], left=64, top=0, right=32, bottom=8, feathering=24),
    "shown": node("MaskToImage", mask=["padded", 1]),
    "shown cut": node("MaskToImage", mask=["cut", 0]),
    "red": node("ImageToMask", image=["whole", 0], channel="red"),
    "shown red": node("MaskToImage", mask=["red", 0]),
    **{
        f"save {source}": node("SaveImage", images=[source, 0], filename_prefix=source)
        for source in ("wide", "whole", "padded", "shown", "shown cut", "shown red")
    },
}


def test_pictures_made_with_core_nodes_are_the_same_without_comfyui(server, tmp_path):
    done = server.succeed(PROMPT)
    with Session(output_dir=tmp_path, input_dir=tmp_path) as session:
        results = session.run(PROMPT)
        for node_id, output in done.outputs.items():
            if not output.get("images"):
                continue
            (theirs,), (ours,) = output["images"], results[node_id].ui["images"]
            with Image.open(io.BytesIO(server.fetch("/view", **theirs))) as image:
                expected = np.asarray(image)
            with Image.open(tmp_path / ours["filename"]) as image:
                assert np.array_equal(np.asarray(image), expected), node_id
    assert len(done.images) == 6
