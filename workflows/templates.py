"""What each template is: its nodes, their values and links, how they are arranged, and what its note says.

The order is that of the list in README.md: text to image, edits, edits inside a mask, chains, conversations, tokenizer,
LoRA.
A node's number is its id in the saved graph, which clients of the queue use: it stays. Nodes that draw are in the last
row, since their live previews make them grow.
"""

from __future__ import annotations

from typing import Any

from ..tiny_shapes.world import instruction
from .parts import Column, Group, Node, Note, Out, Space, Template

LOAD, READ, ROUND, RESULT = "#5f9ea8", "#78a878", "#d0a94e", "#b58ad0"  # colors of groups
SCENE = "a large red circle at the left and a small blue star at the right on a white background"
MODEL, MINGTOK, IMAGE, FEATURES = Out(1, "model"), Out(1, "mingtok"), Out(2, "image"), Out(4, "features")
LATENT = Out(3, "latent")
SWAP = "or Load Image"
DECODE_COLUMN = 112 + 56  # height of MingTok Decode and the space below it
FILE_NAME = 28  # height of the file name above the image of Save Image
SEED = 7


def node(number: int, kind: str, label: str = "", area: int = 0, **inputs: Any) -> Node:
    return Node(number, kind, label, area, inputs)


def column(width: int, *nodes: Node | Note | Space) -> Column:
    return Column(nodes, width)


def group(title: str, color: str, *columns: Column) -> Group:
    return Group(title, color, columns)


def loader() -> Node:
    return node(1, "MingUniVisionLoader")


def scene(number: int = 2, label: str = SWAP, words: str = SCENE, **more: Any) -> Node:
    return node(number, "MingExampleScene", label, scene=words, **{"seed": SEED, **more})


def encode(number: int = 3, image: Out = IMAGE, label: str = "", **more: Any) -> Node:
    return node(number, "MingTokEncode", label, mingtok=MINGTOK, image=image, **more)


def expand(number: int = 4, latent: Out = LATENT, label: str = "") -> Node:
    return node(number, "MingTokSemanticFeatures", label, mingtok=MINGTOK, latent=latent)


def ask(number: int, label: str, words: str, **more: Any) -> Node:
    return node(number, "MingUnderstand", label, model=MODEL, prompt=words, seed=SEED, **more)


def answer(number: int, of: int, area: int = 150) -> Node:
    return node(number, "PreviewAny", "answer", area, source=Out(of, "text"))


def edit(
    number: int,
    label: str,
    words: str | Out,
    features: Out,
    conversation: Out | None = None,
    area: int = 0,
    seed: int = SEED,
    **more: Out,
) -> Node:
    """Both the features and the conversation are linked: a chain still runs when any Ming Edit of it is bypassed."""
    if conversation:
        more["conversation"] = conversation
    return node(number, "MingEdit", label, area, model=MODEL, instruction=words, seed=seed, features=features, **more)


def drawn(number: int) -> tuple[Out, Out]:
    """What a round that draws gives to the next one."""
    return Out(number, "features"), Out(number, "conversation")


def decode(number: int, features: Out, label: str = "", enlarge_to: int = 512) -> Node:
    return node(number, "MingTokDecode", label, mingtok=MINGTOK, features=features, enlarge_to=enlarge_to)


def before(number: int, image: Out = IMAGE, area: int = 324, label: str = "before") -> Node:
    return node(number, "PreviewImage", label, area, images=image)


def save(number: int, image: Out, file: str, area: int = 300, label: str = "after") -> Node:
    return node(number, "SaveImage", label, area, images=image, filename_prefix=f"ming/{file}")


def before_and_after(decoder: Node, first: Node, last: Node, width: int = 300) -> Group:
    """The picture that was edited and the result side by side, the decoder above the first to save width."""
    above = Space(DECODE_COLUMN - FILE_NAME)
    return group("Before and after", RESULT, column(width, decoder, first), column(width, above, last))


def read_coarse_picture() -> tuple[Group, ...]:
    """Load the model and a gray scene, take its detail away, and encode it; the note stands below."""
    return (
        group("Load model and picture", LOAD, column(306, loader(), scene(degrade="grey"))),
        group(
            "Take away detail",
            READ,
            column(
                250,
                node(
                    3,
                    "ImageScale",
                    "remove detail",
                    image=IMAGE,
                    upscale_method="area",
                    width=32,
                    height=32,
                    crop="center",
                ),
                Note(560, 170),
            ),
            column(
                250,
                node(
                    4,
                    "ImageScale",
                    "back to full size",
                    image=Out(3, "IMAGE"),
                    upscale_method="nearest-exact",
                ),
            ),
        ),
        group(
            "Encode once",
            READ,
            column(236, encode(5, Out(4, "IMAGE"))),
            column(258, expand(6, Out(5, "latent"))),
        ),
    )


def sharpen_and_color(width: int) -> tuple[Group, Group]:
    """The first two rounds with a coarse gray scene."""
    words = instruction("super-resolution"), instruction("colorize", SCENE)
    sharpened = edit(8, "1, super-resolution", words[0], Out(6, "features"), seed=SEED)
    colored = edit(10, "2, colorize", words[1], *drawn(8), seed=SEED)
    return (
        group("1. Sharpen", ROUND, column(width, sharpened)),
        group("2. Color", ROUND, column(width, colored)),
    )


def read_picture(*below: Node | Note | Space) -> tuple[Group, Group]:
    """Load the model and the scene, and encode it; what else goes below the encoder."""
    return (
        group("Load model and picture", LOAD, column(306, loader(), scene())),
        group("Encode once", READ, column(236, encode(), *below), column(258, expand())),
    )


CHANGE = "Change the background to navy."
REGION = instruction("identify region", CHANGE)
DESCRIBE = instruction("describe")
HOUSE = instruction("generate", "a large blue house at the centre on a white background")

TEMPLATES = [
    Template(
        "text_to_image",
        ("Text to image", "文生图"),
        ("Draw a picture from words.", "根据文字画一幅图。"),
        (
            "The model draws a picture token by token; MingTok turns it into pixels.",
            "To see a coarse preview on the node meanwhile, set *Live preview method* to *auto* in the settings.",
        ),
        (
            (
                group("Load model", LOAD, column(300, loader(), Note(300, 200))),
                group(
                    "Draw",
                    ROUND,
                    column(
                        320,
                        node(
                            3,
                            "MingGenerate",
                            area=110,
                            model=MODEL,
                            prompt=instruction("generate", "a large red circle at the left on a white background"),
                            seed=SEED,
                        ),
                    ),
                ),
                group(
                    "Result",
                    RESULT,
                    column(220, decode(4, Out(3, "features"))),
                    column(420, save(5, Out(4, "image"), "text_to_image", 420, "result")),
                ),
            ),
        ),
    ),
    Template(
        "describe",
        ("Describe a picture", "描述图片"),
        ("Ask about a picture.", "就一幅图提问。"),
        (
            "The picture is encoded once; the model reads its features and answers.",
            "Try *What color is the star?*; for photographs, use *stretch* and *high* in MingTok Encode.",
        ),
        (
            (
                group("Load model and picture", LOAD, column(306, loader(), scene())),
                group(
                    "Encode once",
                    READ,
                    column(250, encode(), before(8, area=250, label="the picture")),
                    column(258, expand()),
                ),
                group(
                    "Ask",
                    ROUND,
                    column(300, ask(6, "ask", DESCRIBE, features=FEATURES), Note(300, 250)),
                    column(300, answer(7, 6, 220)),
                ),
            ),
        ),
    ),
    Template(
        "draw_then_ask",
        ("Draw, then ask", "先画图，再提问"),
        ("Draw a picture and ask about it without decoding it.", "画一幅图，不解码就提问。"),
        (
            "The model draws a picture, then describes it from its own features: it never sees pixels.",
            "Try your own question about the picture.",
        ),
        (
            (
                group("Load model", LOAD, column(300, loader(), Note(300, 230))),
                group(
                    "Draw",
                    ROUND,
                    column(
                        320,
                        node(
                            3,
                            "MingGenerate",
                            area=110,
                            model=MODEL,
                            prompt=instruction("generate", "a small yellow star at the top right on a navy background"),
                            seed=SEED,
                        ),
                    ),
                ),
                group(
                    "Ask, without decoding",
                    ROUND,
                    column(
                        290,
                        ask(5, "without decoding", DESCRIBE, features=Out(3, "features"), conversation=drawn(3)[1]),
                        decode(7, Out(3, "features")),
                    ),
                ),
                group(
                    "Answer and picture",
                    RESULT,
                    column(360, answer(6, 5, 160), save(8, Out(7, "image"), "draw_then_ask", 360, "result")),
                ),
            ),
        ),
    ),
    Template(
        "edit_inside_mask",
        ("Edit inside a mask", "在遮罩内编辑"),
        (
            "Change only what a mask allows; every other pixel stays as it is.",
            "只改变遮罩允许的部分，其余像素保持不变。",
        ),
        (
            "Only tokens under the white part are drawn again; the last node lays them over the picture, so that every "
            "pixel outside stays as it was.",
            "With your own picture, use Load Image, *Open in MaskEditor*, and its mask in place of Combine Masks.",
        ),
        (
            (
                group("Load model and picture", LOAD, column(306, loader(), scene())),
                group(
                    "What may change",
                    READ,
                    column(
                        256,
                        node(3, "SolidMask", "nothing", value=0.0, width=512, height=512),
                        node(4, "SolidMask", "the part", value=1.0, width=176, height=176),
                    ),
                    column(
                        250,
                        node(
                            5,
                            "MaskComposite",
                            "where it lies",
                            destination=Out(3, "MASK"),
                            source=Out(4, "MASK"),
                            x=0,
                            y=168,
                            operation="add",
                        ),
                    ),
                ),
                group(
                    "Encode once",
                    READ,
                    # the whole picture, whatever its shape: the last node stretches the result back over it
                    column(236, encode(6, mask=Out(5, "MASK"), fit="stretch")),
                    column(258, expand(7, Out(6, "latent"))),
                ),
            ),
            (
                group(
                    "Edit inside the mask",
                    ROUND,
                    column(
                        290,
                        edit(
                            8,
                            "inside the mask",
                            "Change the color of the red circle to green.",
                            Out(7, "features"),
                            mask=Out(6, "mask"),
                        ),
                    ),
                ),
                group(
                    "Lay it over the picture",
                    READ,
                    column(220, decode(9, Out(8, "features"), enlarge_to=0), Space(44), Note(550, 170)),
                    column(
                        260,
                        node(
                            10,
                            "ImageCompositeMasked",
                            destination=IMAGE,
                            source=Out(9, "image"),
                            resize_source=True,
                            mask=Out(5, "MASK"),
                        ),
                    ),
                ),
                group(
                    "Before and after",
                    RESULT,
                    column(300, before(12)),
                    column(300, save(11, Out(10, "IMAGE"), "edit_inside_mask")),
                ),
            ),
        ),
    ),
    Template(
        "region_then_edit_inside",
        ("Find the region, edit inside it", "先找区域，再在其中编辑"),
        (
            "The model shows where it would edit; the edit stays inside that region.",
            "模型先指出要编辑的区域，编辑只在其中进行。",
        ),
        (
            "The model draws the region of the edit, Ming Region Mask reads it as a mask, and the edit stays inside.",
            "Try another edit, with the same words in both Ming Edit nodes.",
        ),
        (
            (
                *read_picture(),
                group("", LOAD, column(380, Note(380, 240))),
                group("Before", RESULT, column(270, before(10, area=250))),
            ),
            (
                group(
                    "1. Find the region",
                    ROUND,
                    column(
                        262,
                        edit(
                            5,
                            "1, identify the region",
                            instruction("identify region", "Change the color of the red circle to green."),
                            FEATURES,
                        ),
                    ),
                    column(222, node(6, "MingRegionMask", features=FEATURES, region=Out(5, "features"))),
                ),
                group(
                    "2. Edit inside it",
                    ROUND,
                    column(
                        262,
                        edit(
                            7,
                            "2, inside the region",
                            "Change the color of the red circle to green.",
                            FEATURES,
                            Out(5, "conversation"),
                            mask=Out(6, "mask"),
                        ),
                    ),
                ),
                group(
                    "Region and after",
                    RESULT,
                    column(
                        210, decode(8, Out(7, "features")), node(11, "MaskToImage", "the region", mask=Out(6, "mask"))
                    ),
                    column(240, before(12, Out(11, "IMAGE"), 270, "region")),
                    column(240, save(9, Out(8, "image"), "region_then_edit_inside", 246)),
                ),
            ),
        ),
    ),
    Template(
        "extend_picture",
        ("Extend a picture", "扩展图片"),
        ("Keep a picture and draw what lies beside it.", "保留原图，画出旁边的内容。"),
        (
            "Pad Image adds a gray part and masks it: the picture stays, and the rest is drawn from words.",
            "Try to pad another side, and say what is to be seen there.",
        ),
        (
            (
                group("Load model and picture", LOAD, column(306, loader(), scene())),
                group(
                    "Make room",
                    READ,
                    column(
                        236,
                        node(3, "ImageCrop", "what we have", image=IMAGE, width=256, height=512),
                        Space(60),
                        Note(562, 150),
                    ),
                    column(250, node(4, "ImagePadForOutpaint", image=Out(3, "IMAGE"), right=256, feathering=0)),
                ),
                group(
                    "Encode once",
                    READ,
                    column(236, encode(5, Out(4, "IMAGE"), mask=Out(4, "MASK"))),
                    column(258, expand(6, Out(5, "latent"))),
                ),
            ),
            (
                group(
                    "Draw the rest",
                    ROUND,
                    column(
                        300,
                        edit(
                            7,
                            "extend",
                            "Extend the picture to the right: a small blue star at the right.",
                            Out(6, "features"),
                            mask=Out(5, "mask"),
                        ),
                    ),
                ),
                group(
                    "Before and after",
                    RESULT,
                    column(220, decode(8, Out(7, "features"))),
                    column(340, before(10, Out(4, "IMAGE"), 364)),
                    column(340, save(9, Out(8, "image"), "extend_picture", 340)),
                ),
            ),
        ),
    ),
    Template(
        "edit_photograph",
        ("Edit a part of a photograph", "编辑照片的一部分"),
        (
            "Cut a square out of a photograph of any size, edit it, and put it back.",
            "从任意尺寸的照片中裁出一块方形，编辑后放回原处。",
        ),
        (
            "The model draws at one size, so a square is cut out, edited, scaled back and laid over the photograph.",
            "With a photograph of yours, enter the same place and size in all nodes that are named *the part*.",
        ),
        (
            (
                group(
                    "Load model and photograph",
                    LOAD,
                    column(306, loader(), scene(words=SCENE.replace("large", "small"), size=1024)),
                ),
                group(
                    "Cut out a part",
                    READ,
                    column(
                        250,
                        node(3, "ImageCrop", "the part", image=IMAGE, width=768, height=768, x=0, y=128),
                        Space(30),
                        Note(560, 180),
                    ),
                ),
                group(
                    "Encode once",
                    READ,
                    column(236, encode(4, Out(3, "IMAGE"))),
                    column(258, expand(5, Out(4, "latent"))),
                ),
                group("Before", RESULT, column(300, before(13))),
            ),
            (
                group(
                    "Edit",
                    ROUND,
                    column(270, edit(6, "edit", "Change the color of the red circle to green.", Out(5, "features"))),
                ),
                group(
                    "Put it back",
                    READ,
                    column(
                        230,
                        decode(7, Out(6, "features"), enlarge_to=0),
                        node(9, "SolidMask", "the part", value=1.0, width=768, height=768),
                    ),
                    column(
                        260,
                        node(
                            8,
                            "ImageScale",
                            "the part",
                            image=Out(7, "image"),
                            upscale_method="bicubic",
                            width=768,
                            height=768,
                        ),
                        node(
                            10,
                            "FeatherMask",
                            "soft edges",
                            mask=Out(9, "MASK"),
                            left=32,
                            top=32,
                            right=32,
                            bottom=32,
                        ),
                    ),
                    column(
                        260,
                        node(
                            11,
                            "ImageCompositeMasked",
                            "the part",
                            destination=IMAGE,
                            source=Out(8, "IMAGE"),
                            x=0,
                            y=128,
                            mask=Out(10, "MASK"),
                        ),
                    ),
                ),
                group(
                    "Result",
                    RESULT,
                    column(300, save(12, Out(11, "IMAGE"), "edit_photograph")),
                ),
            ),
        ),
    ),
    Template(
        "segment_then_edit",
        ("Show the region, then edit", "先显示区域，再编辑"),
        (
            "The model first shows where it would edit, then makes the edit.",
            "模型先显示要编辑的区域，再进行编辑。",
        ),
        (
            "First the model shows *where* it would edit, then it makes the edit in the same conversation.",
            "Try another edit, with the same text in Ming Instruction and in the second Ming Edit.",
        ),
        (
            (
                group("Load model and picture", LOAD, column(306, loader(), scene())),
                group(
                    "Encode once",
                    READ,
                    column(236, encode()),
                    column(
                        280,
                        expand(),
                        node(
                            5,
                            "MingInstruction",
                            "identify region",
                            task="identify region",
                            text="Move the red circle to the top.",
                        ),
                    ),
                ),
                group("", LOAD, column(330, Note(330, 260))),
                group("Before", RESULT, column(270, before(14, area=250))),
            ),
            (
                group(
                    "1. Show the region",
                    ROUND,
                    column(290, edit(6, "1, identify the region", Out(5, "instruction"), FEATURES, area=54)),
                ),
                group(
                    "2. Edit",
                    ROUND,
                    column(290, edit(8, "2, edit", "Move the red circle to the top.", *drawn(6))),
                ),
                group(
                    "Region and after",
                    RESULT,
                    column(230, decode(9, Out(6, "features"), "region"), decode(11, Out(8, "features"), "edit")),
                    column(270, save(10, Out(9, "image"), "segment_then_edit_region", 300, "region")),
                    column(270, save(12, Out(11, "image"), "segment_then_edit", 300)),
                ),
            ),
        ),
    ),
    Template(
        "multi_round_edit",
        ("Four rounds, one decode", "四轮对话，一次解码"),
        (
            "Describe, find the region, edit, refine: four rounds in feature space.",
            "描述、找区域、编辑、润色：四轮都在特征空间中进行。",
        ),
        (
            "Four rounds, one encode, one decode: between the rounds there are features, no pixels.",
            "Try another edit in rounds 2 and 3; only the rounds that changed run again.",
        ),
        (
            (
                *read_picture(Note(546, 166)),
                group(
                    "1. What does it show?",
                    ROUND,
                    column(290, ask(6, "1, describe", DESCRIBE, features=FEATURES)),
                    column(290, answer(7, 6, 180)),
                ),
            ),
            (
                group(
                    "2. Find the region",
                    ROUND,
                    column(270, edit(9, "2, identify region", REGION, FEATURES, Out(6, "conversation"))),
                ),
                group("3. Edit", ROUND, column(270, edit(11, "3, edit", CHANGE, *drawn(9)))),
                group("4. Refine", ROUND, column(270, edit(13, "4, refine", instruction("refine"), *drawn(11)))),
                before_and_after(
                    decode(14, Out(13, "features"), "once"),
                    before(16, area=240),
                    save(15, Out(14, "image"), "multi_round_edit", 240),
                    280,
                ),
            ),
        ),
    ),
    Template(
        "super_resolution_then_colorize",
        ("Sharpen, then color", "先变清晰，再上色"),
        (
            "Sharpen a coarse gray picture, then color it from a description.",
            "先把粗糙的灰色图变清晰，再按描述上色。",
        ),
        (
            "A coarse gray picture is sharpened, then colored from a description; the sharp one is never decoded.",
            "Try other colors; with your own picture, describe it in the second Ming Edit.",
        ),
        (
            read_coarse_picture(),
            (
                *sharpen_and_color(290),
                group(
                    "Before and after",
                    RESULT,
                    column(220, decode(11, Out(10, "features"))),
                    column(310, before(13, Out(4, "IMAGE"), 334)),
                    column(310, save(12, Out(11, "image"), "super_resolution_then_colorize", 310)),
                ),
            ),
        ),
    ),
    Template(
        "enhance_chain",
        ("Three repairs in a row", "连续三次修复"),
        (
            "Sharpen, color and clean a picture, decoded once at the end.",
            "变清晰、上色、去噪，最后只解码一次。",
        ),
        (
            "Three repairs in a row, all in feature space; the result is decoded once, at the end.",
            "Try to bypass one of them; with your own picture, describe it in the second Ming Edit.",
        ),
        (
            read_coarse_picture(),
            (
                *sharpen_and_color(270),
                group(
                    "3. Clean",
                    ROUND,
                    column(270, edit(12, "3, denoise", instruction("denoise"), *drawn(10), seed=SEED)),
                ),
                before_and_after(
                    decode(13, Out(12, "features"), "once"),
                    before(15, Out(4, "IMAGE"), 250),
                    save(14, Out(13, "image"), "enhance_chain", 250),
                ),
            ),
        ),
    ),
    Template(
        "branch_edits",
        ("Two edits of one conversation", "同一对话的两个分支"),
        (
            "Two different edits go on from the same round.",
            "两个不同的编辑从同一轮继续。",
        ),
        (
            "Two edits go on from one conversation; neither changes the other, and what they share is computed once.",
            "Try a third branch, or go on with one of them.",
        ),
        (
            (
                *read_picture(Note(570, 150)),
                group(
                    "What does it show?",
                    ROUND,
                    column(290, ask(6, "describe", DESCRIBE, features=FEATURES)),
                    column(300, answer(13, 6, 130), before(14, area=180, label="the picture")),
                ),
            ),
            (
                group(
                    "Branch A",
                    ROUND,
                    column(
                        280,
                        edit(7, "branch A", "Move the blue star to the top right.", FEATURES, Out(6, "conversation")),
                    ),
                ),
                group(
                    "Branch B",
                    ROUND,
                    column(
                        280, edit(8, "branch B", "Change the background to navy.", FEATURES, Out(6, "conversation"))
                    ),
                ),
                group(
                    "A and B",
                    RESULT,
                    column(230, decode(9, Out(7, "features"), "A"), decode(11, Out(8, "features"), "B")),
                    column(330, save(10, Out(9, "image"), "branch_edits_a", 330, "branch A")),
                    column(330, save(12, Out(11, "image"), "branch_edits_b", 330, "branch B")),
                ),
            ),
        ),
    ),
    Template(
        "chat",
        ("A chat that draws", "会画图的聊天"),
        (
            "Every press of Run adds a round: say what to draw, then what to change.",
            "每按一次运行就多一轮：先说画什么，再说改什么。",
        ),
        (
            "Every press of Run adds a round to the saved conversation; the storyboard decodes and shows all of it.",
            "Run it, write *Change the background to navy.*, run it again; another name begins a new chat.",
        ),
        (
            (
                group("Load model", LOAD, column(300, loader(), Note(300, 320))),
                group(
                    "So far",
                    READ,
                    column(270, node(2, "MingContinueConversation", model=MODEL, name="chat")),
                ),
                group(
                    "The next round",
                    ROUND,
                    column(
                        320,
                        node(
                            3,
                            "MingGenerate",
                            "say it here",
                            area=110,
                            model=MODEL,
                            prompt="a large red circle at the left and a small blue star at the right",
                            seed=SEED,
                            conversation=Out(2, "conversation"),
                        ),
                    ),
                ),
                group(
                    "The whole conversation",
                    RESULT,
                    column(
                        480,
                        node(
                            4,
                            "MingSaveConversation",
                            conversation=Out(3, "conversation"),
                            filename_prefix="chat",
                            overwrite=True,
                        ),
                        node(
                            5,
                            "MingConversationStoryboard",
                            area=380,
                            mingtok=MINGTOK,
                            conversation=Out(3, "conversation"),
                        ),
                    ),
                ),
            ),
        ),
    ),
    Template(
        "save_and_continue",
        ("Save a conversation", "保存对话"),
        (
            "Save a conversation after each round, to go on later.",
            "每一轮后保存对话，以便以后继续。",
        ),
        (
            "The conversation is saved after each round, in a small file in output/ming.",
            "Try Ming Load Conversation: choose the saved file, and link it to a new Ming Edit.",
        ),
        (
            (
                *read_picture(Note(546, 166)),
                group(
                    "1. What does it show?",
                    ROUND,
                    column(290, ask(6, "1, describe", DESCRIBE, features=FEATURES)),
                    column(
                        290,
                        answer(7, 6, 110),
                        node(
                            8,
                            "MingSaveConversation",
                            "round 1",
                            conversation=Out(6, "conversation"),
                            filename_prefix="first_round",
                        ),
                    ),
                ),
            ),
            (
                group(
                    "2. Edit",
                    ROUND,
                    column(290, edit(9, "2, edit", "Remove the blue star.", FEATURES, Out(6, "conversation"))),
                    column(
                        280,
                        decode(12, Out(9, "features")),
                        node(
                            10,
                            "MingSaveConversation",
                            "round 2",
                            conversation=Out(9, "conversation"),
                            filename_prefix="second_round",
                        ),
                        node(
                            11, "MingSaveFeatures", features=Out(9, "features"), filename_prefix="second_round_picture"
                        ),
                    ),
                ),
                group(
                    "Before and after",
                    RESULT,
                    column(340, before(14, area=364)),
                    column(340, save(13, Out(12, "image"), "save_and_continue", 340)),
                ),
            ),
        ),
    ),
    Template(
        "text_chat",
        ("Chat in words", "文字聊天"),
        ("A chat without pictures.", "没有图片的聊天。"),
        (
            "A plain chat without pictures: the second question sees the first answer.",
            "Try a temperature of 0.7 and other seeds.",
        ),
        (
            (
                group("Load model", LOAD, column(290, loader(), Note(290, 220))),
                group(
                    "Two questions",
                    ROUND,
                    column(290, ask(2, "first question", "Which shapes do you know?")),
                    column(
                        290,
                        ask(3, "second question", "What backgrounds are there?", conversation=Out(2, "conversation")),
                    ),
                ),
                group(
                    "Read it",
                    RESULT,
                    column(250, node(4, "MingConversationTranscript", conversation=Out(3, "conversation"))),
                    column(340, node(5, "PreviewAny", "transcript", 300, source=Out(4, "transcript"))),
                ),
            ),
        ),
    ),
    Template(
        "compare_two_pictures",
        ("Ask about two pictures", "就两幅图提问"),
        ("Show the model two pictures in one message.", "在一条消息里给模型看两幅图。"),
        (
            "Ming Features Batch puts both pictures into one message, and the model answers about the two.",
            "Try another question, or pictures of your own.",
        ),
        (
            (
                group("Load model", LOAD, column(280, loader())),
                group(
                    "Two pictures",
                    LOAD,
                    column(
                        290,
                        scene(2, "the first", "a large red circle at the left on a white background", seed=SEED),
                        scene(3, "the second", "a small blue star at the right on a navy background", seed=SEED),
                    ),
                ),
                group(
                    "Encode each once",
                    READ,
                    column(236, encode(4), Space(52), encode(5, Out(3, "image"))),
                    column(258, expand(6, Out(4, "latent")), Space(112), expand(7, Out(5, "latent"))),
                    column(
                        240, node(8, "MingFeaturesBatch", features_a=Out(6, "features"), features_b=Out(7, "features"))
                    ),
                ),
            ),
            (
                group("", LOAD, column(300, Note(300, 250))),
                group(
                    "The first and the second",
                    RESULT,
                    column(300, before(11, area=300, label="the first")),
                    column(300, before(12, Out(3, "image"), 300, "the second")),
                ),
                group(
                    "Ask about both",
                    ROUND,
                    column(290, ask(9, "about both", "Which picture has a star?", features=Out(8, "features"))),
                    column(290, answer(10, 9, 200)),
                ),
            ),
        ),
    ),
    Template(
        "reconstruct",
        ("There and back", "编码再解码"),
        ("What the tokenizer keeps of a picture.", "分词器保留了图片的多少内容。"),
        (
            "A picture goes through MingTok and back: latents, semantic features, pixels.",
            "Try another seed, or your own picture.",
        ),
        (
            (
                group(
                    "Load tokenizer and picture",
                    LOAD,
                    column(290, node(1, "MingTokLoader"), scene(words="")),
                    column(
                        260,
                        node(
                            10,
                            "ImageScale",
                            "a square",
                            image=IMAGE,
                            upscale_method="bicubic",
                            width=512,
                            height=512,
                            crop="center",
                        ),
                    ),
                ),
                group(
                    "Encode, expand, decode",
                    READ,
                    column(236, encode(), Note(570, 140)),
                    column(258, expand()),
                    column(220, decode(5, FEATURES, enlarge_to=0)),
                ),
            ),
            (
                group(
                    "Before and after",
                    RESULT,
                    column(
                        260,
                        node(
                            6,
                            "ImageScale",
                            "back to that size",
                            image=Out(5, "image"),
                            upscale_method="bicubic",
                            width=512,
                            height=512,
                        ),
                    ),
                    column(320, before(11, Out(10, "IMAGE"), 344)),
                    column(320, save(7, Out(6, "IMAGE"), "reconstruct", 320)),
                ),
                group(
                    "How alike?",
                    ROUND,
                    column(230, node(8, "MingImageMetrics", image_a=Out(10, "IMAGE"), image_b=Out(6, "IMAGE"))),
                    column(250, node(9, "PreviewAny", "metrics", 110, source=Out(8, "report"))),
                ),
            ),
        ),
    ),
    Template(
        "draw_with_lora",
        ("Draw with a LoRA", "用 LoRA 画图"),
        (
            "Teach the model a new shape with a LoRA, and see what it drew before.",
            "用 LoRA 教模型画一种新形状，并与之前的结果对比。",
        ),
        (
            "The built-in model has never seen a house; a LoRA of 40 pictures taught it to draw one.",
            "Try other words, a strength of 0.5, or a LoRA that you trained yourself.",
        ),
        (
            (
                group("Load model", LOAD, column(300, loader())),
                group(
                    "Add the LoRA",
                    READ,
                    column(300, node(2, "MingLoraLoader", model=MODEL, lora_name="tiny-shapes-houses.safetensors")),
                ),
                group("", LOAD, column(560, Note(560, 150))),
            ),
            (
                group(
                    "Draw without it and with it",
                    ROUND,
                    column(300, node(3, "MingGenerate", "without the LoRA", model=MODEL, prompt=HOUSE, seed=SEED)),
                    column(
                        300, node(4, "MingGenerate", "with the LoRA", model=Out(2, "model"), prompt=HOUSE, seed=SEED)
                    ),
                ),
                group(
                    "Without and with the LoRA",
                    RESULT,
                    column(
                        230,
                        decode(5, Out(3, "features"), "without the LoRA"),
                        decode(6, Out(4, "features"), "with the LoRA"),
                    ),
                    column(310, before(7, Out(5, "image"), 334, "without the LoRA")),
                    column(310, save(8, Out(6, "image"), "draw_with_lora", 310, "with the LoRA")),
                ),
            ),
        ),
    ),
]
