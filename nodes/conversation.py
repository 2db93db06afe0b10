"""Look, draw, edit, round after round: the nodes that pass a conversation on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from ..ming_core import (
    Conversation,
    Engine,
    Features,
    Guidance,
    ImageOptions,
    Progress,
    Sampling,
    Solver,
    TextOptions,
)
from ..ming_core import load_conversation as read_conversation
from ..ming_core import save_conversation as write_conversation
from ..ming_core.engine import EMPTY_PROMPT
from ..ming_core.images import to_images, to_uint8
from ..ming_core.options import STARTS
from ..ming_core.saved import CONVERSATION_FORMAT
from ..ming_core.solver import METHODS
from . import host
from .saved_files import LoadingNode, SavingNode, saved_as, saved_path
from .widgets import CATEGORY, FEATURES, TOOLS, combo, file_name, integer, number, prompt, seed, socket

ADVANCED = {"advanced": True}
PREVIEWS = 4  # of a picture while it is drawn; each costs at most one pixel decoding


def _prompt_verdict(text: str | None) -> bool | str:
    """What VALIDATE_INPUTS says of a prompt. None: it is linked, and checked when it is known."""
    return True if text is None or text.strip() else EMPTY_PROMPT


def _reporter(node: object, most: int, model: Engine | None = None) -> Callable[[Progress], None]:
    """on_token of a node, for a round of at most `most` tokens: moves the bar, shows the text and the picture so far.

    Of several pictures the first is shown. While a long prompt is read the bar stands, but Interrupt is heard.
    """
    report = host.progress(most, type(node).__name__)
    previewing = model is not None and host.previews_wanted()
    value, total = 0, most

    def on_token(progress: Progress) -> None:
        nonlocal value, total
        value += progress.kind != "prompt"
        picture = None
        if progress.kind == "image":
            total = value - progress.done + progress.total + 1  # known now, but for what the model says afterwards
            if previewing and progress.done % -(-progress.total // PREVIEWS) == 0:
                pixels = model.mingtok.preview(progress.tokens[:1], model.config.drawing_grid)
                picture = Image.fromarray(to_uint8(to_images(pixels)[0]))
        report(value, progress.text or None, total=max(value, total), picture=picture)

    return on_token


class MingUnderstand:
    DESCRIPTION = "Asks the model, about pictures or in plain text, and gives its answer."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("STRING", "MING_CONVERSATION"), ("text", "conversation")
    OUTPUT_TOOLTIPS = ("The answer.", "The conversation with this round, for the next one.")
    FUNCTION = "ask"
    SEARCH_ALIASES = ("caption", "describe image", "vqa", "image to text", "chat")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": socket("MING_UNIVISION", "The model, from Load Ming-UniVision."),
                "prompt": prompt("What to ask.", "Please describe the picture in detail."),
                "max_new_tokens": integer(512, 1, 4096, "The answer ends after this many tokens at the latest."),
                "temperature": number(0.0, 0.0, 2.0, 0.05, "0: always the most likely word. Above: freer words."),
                "top_p": number(
                    1.0,
                    0.01,
                    1.0,
                    0.01,
                    "Above temperature 0: only the most likely words that together have this probability.",
                    **ADVANCED,
                ),
                "seed": seed("Above temperature 0: another seed, another answer.", changes=False, **ADVANCED),
            },
            "optional": {
                "features": socket(
                    "MING_FEATURES",
                    "Pictures to look at. One that the conversation shows already is not attached again.",
                ),
                "conversation": socket("MING_CONVERSATION", "What was said and drawn before."),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return _prompt_verdict(prompt)

    def ask(
        self,
        model: host.Loaded,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        features: Features | None = None,
        conversation: Conversation | None = None,
    ) -> tuple[str, Conversation]:
        conversation = conversation or Conversation()
        options = TextOptions(max_new_tokens, Sampling(temperature, top_p), seed)
        plan = model.model.plan(conversation, prompt, options, features)
        engine: Engine = host.ready(model, plan.working_memory)
        result = engine.write(plan, _reporter(self, max_new_tokens))
        host.show_text(result.text, type(self).__name__)
        return result.text, result.conversation


class _Drawing:
    """What MingGenerate and MingEdit share."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MING_FEATURES", "MING_CONVERSATION", "STRING")
    RETURN_NAMES = ("features", "conversation", "text")
    OUTPUT_IS_LIST = (True, True, True)
    OUTPUT_TOOLTIPS = (
        "The drawn picture as features, one item a picture: decode it, or hand it on.",
        "The conversation with this round, one a picture, for the next round.",
        "What the model said beside the picture, if anything.",
    )
    FUNCTION = "draw"

    # Widgets of both nodes; each node has its own order.
    MODEL = socket("MING_UNIVISION", "The model, from Load Ming-UniVision.")
    SEED = seed(
        "Another seed, another picture. One seed may serve a whole chain: each round has noise of its own.",
        changes=True,
    )
    BATCH = integer(1, 1, 16, "Pictures at once, in one pass over the weights; each further one has the next seed.")
    TEXT_GUIDANCE = number(3.0, 0.0, 20.0, 0.1, "How closely the words are followed; 1 switches it off.")
    STEPS = integer(16, 1, 64, "Steps of the flow head for every token; fewer are faster.", **ADVANCED)
    TEMPERATURE = number(1.0, 0.0, 2.0, 0.05, "Strength of the noise that each token begins as.", **ADVANCED)
    SOLVER = combo(
        list(METHODS),
        "How the steps are made. ab2: of second order at the same cost; 12 steps are as exact as 16 of euler.",
        **ADVANCED,
    )
    START = combo(
        list(STARTS),
        "draw now: begin the picture at once. model decides: the model may write first, and must begin it itself.",
        **ADVANCED,
    )
    MAX_NEW_TOKENS = integer(64, 1, 4096, "Most tokens of text before and after the picture.", **ADVANCED)
    CONVERSATION = socket("MING_CONVERSATION", "What was said and drawn before.")

    def draw(
        self,
        model: host.Loaded,
        prompt: str,
        seed: int,
        batch_size: int,
        text_guidance: float,
        image_guidance: float,
        steps: int,
        temperature: float,
        solver: str,
        start: str,
        max_new_tokens: int,
        features: Features | None = None,
        conversation: Conversation | None = None,
    ) -> tuple[list[Features], list[Conversation], list[str]]:
        conversation = conversation or Conversation()
        options = ImageOptions(
            tuple(seed + k for k in range(batch_size)),
            Guidance(text_guidance, image_guidance),
            Solver(steps, solver),
            temperature,
            start,
            max_new_tokens,
        )
        plan = model.model.plan(conversation, prompt, options, features)
        engine: Engine = host.ready(model, plan.working_memory)
        tokens = max_new_tokens + engine.config.llm_config.num_image_tokens_for_gen
        results = engine.draw(plan, _reporter(self, tokens, engine))
        host.show_text(results[0].text, type(self).__name__)
        return [r.features for r in results], [r.conversation for r in results], [r.text for r in results]


class MingGenerate(_Drawing):
    DESCRIPTION = "Draws a picture from a description. The result is features: decode them, or edit on."
    SEARCH_ALIASES = ("text to image", "t2i", "draw")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        image_guidance = number(
            1.1,
            0.0,
            10.0,
            0.05,
            "How closely what came before is followed; only with a conversation.",
            **ADVANCED,
        )
        return {
            "required": {
                "model": cls.MODEL,
                "prompt": prompt("What to draw."),
                "seed": cls.SEED,
                "batch_size": cls.BATCH,
                "text_guidance": cls.TEXT_GUIDANCE,
                "steps": cls.STEPS,
                "temperature": cls.TEMPERATURE,
                "solver": cls.SOLVER,
                "start": cls.START,
                "max_new_tokens": cls.MAX_NEW_TOKENS,
                "image_guidance": image_guidance,
            },
            "optional": {"conversation": cls.CONVERSATION},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return _prompt_verdict(prompt)


ABSENT = object()
NO_PICTURE = (
    "there is no picture to edit: connect features (MingTok Encode, then MingTok Semantic Features) or a conversation "
    "that shows one; to draw from words alone, use MingGenerate (Ming Generate)"
)


class MingEdit(_Drawing):
    DESCRIPTION = (
        "Draws the picture in view anew, as the instruction says. Feature to feature: a chain of edits is decoded to "
        "pixels once, at its end."
    )
    SEARCH_ALIASES = ("image edit", "instruct edit", "inpaint", "multi-round edit")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": cls.MODEL,
                "instruction": prompt("What to change, in words. Ming Instruction has tried phrasings."),
                "seed": cls.SEED,
                "batch_size": cls.BATCH,
                "text_guidance": cls.TEXT_GUIDANCE,
                "image_guidance": number(
                    1.1,
                    0.0,
                    10.0,
                    0.05,
                    "How closely the picture is followed; 1: no more than the model does by itself.",
                ),
                "steps": cls.STEPS,
                "temperature": cls.TEMPERATURE,
                "solver": cls.SOLVER,
                "start": cls.START,
                "max_new_tokens": cls.MAX_NEW_TOKENS,
            },
            "optional": {
                "features": socket(
                    "MING_FEATURES",
                    "The picture to edit, or several for one message. One that the "
                    "conversation shows already is not attached again.",
                ),
                "conversation": cls.CONVERSATION,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, instruction: str | None = None, features: object = ABSENT, conversation: object = ABSENT
    ) -> bool | str:
        """What is linked comes as None."""
        return NO_PICTURE if features is conversation is ABSENT else _prompt_verdict(instruction)

    def draw(
        self,
        instruction: str,
        features: Features | None = None,
        conversation: Conversation | None = None,
        **widgets: Any,
    ) -> tuple[list[Features], list[Conversation], list[str]]:
        if features is None and not (conversation and conversation.images):
            raise ValueError(NO_PICTURE)
        return super().draw(prompt=instruction, features=features, conversation=conversation, **widgets)


class MingSaveConversation(SavingNode):
    DESCRIPTION = "Saves a conversation to output/ming, in kilobytes: token ids and latents."
    CATEGORY = TOOLS
    RETURN_TYPES: tuple = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    SEARCH_ALIASES = ("store conversation",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "conversation": socket("MING_CONVERSATION", "The conversation to keep."),
                "filename_prefix": file_name("conversation"),
            }
        }

    def save(self, conversation: Conversation, filename_prefix: str) -> dict:
        return saved_as(filename_prefix, lambda path: write_conversation(conversation, path))


class MingLoadConversation(LoadingNode):
    DESCRIPTION = "Loads a saved conversation, to go on with it. It needs the model that it was held with."
    FILE_FORMAT = CONVERSATION_FORMAT
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("MING_CONVERSATION",), ("conversation",)
    OUTPUT_TOOLTIPS = ("The conversation, as it was saved.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("continue conversation",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": socket("MING_UNIVISION", "The model that the conversation was held with."),
                "file": cls.files("A file of Ming Save Conversation."),
            }
        }

    def load(self, model: host.Loaded, file: str) -> tuple[Conversation]:
        def ready(tokens: int) -> None:
            host.ready(model, model.model.mingtok.working_memory(1, tokens))

        report = host.progress(1)

        def on_picture(done: int, pictures: int) -> None:
            report(done, total=pictures)

        return (read_conversation(saved_path(file), model.model, ready, on_picture),)


class MingConversationPicture:
    DESCRIPTION = "Takes one picture out of a conversation, as features."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("That picture.",)
    FUNCTION = "pick"
    SEARCH_ALIASES = ("picture from conversation", "last picture")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "conversation": socket("MING_CONVERSATION", "A conversation that shows pictures."),
                "index": integer(-1, -1024, 1023, "0 is the first picture, seen or drawn; -1 the last one."),
            }
        }

    def pick(self, conversation: Conversation, index: int) -> tuple[Features]:
        pictures = conversation.images
        if not -len(pictures) <= index < len(pictures):
            n = len(pictures)
            has = f"{n} picture{'s' * (n > 1)} (0 to {n - 1}, or -1 to {-n} from the end)" if n else "no picture"
            raise ValueError(f"there is no picture {index}: this conversation has {has}")
        return (pictures[index].features,)


class MingConversationTranscript:
    DESCRIPTION = "Writes a conversation out as text, for people to read."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("transcript",)
    OUTPUT_TOOLTIPS = ("The rounds, one after the other.",)
    FUNCTION = "write"
    SEARCH_ALIASES = ("conversation to text", "chat log")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"conversation": socket("MING_CONVERSATION", "The conversation to read.")}}

    def write(self, conversation: Conversation) -> tuple[str]:
        return (conversation.transcript(),)
