"""The nodes that run a round of the model: Ming Understand, Ming Generate, Ming Edit.

Each plans its round before the model is brought to the GPU, so that a round that cannot work fails at once.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ming_core import (
    Conversation,
    Engine,
    Features,
    Guidance,
    ImageOptions,
    RoundResult,
    Sampling,
    Solver,
    TextOptions,
)
from ..ming_core.engine import EMPTY_PROMPT
from ..ming_core.options import STARTS
from ..ming_core.solver import METHODS
from . import host
from .progress import DrawingProgress, WritingProgress
from .translation import in_page_language
from .widgets import CATEGORY, combo, integer, number, prompt, seed, socket

ADVANCED = {"advanced": True}

MODEL = socket("MING_UNIVISION", "The model from Load Ming-UniVision.")
CONVERSATION = socket("MING_CONVERSATION", "Earlier rounds to continue from.")


def _validate_prompt(text: str | None) -> bool | str:
    """For VALIDATE_INPUTS. None means that the prompt is linked; it is checked when the node runs."""
    return EMPTY_PROMPT if isinstance(text, str) and not text.strip() else True


def _with_notes(result: RoundResult, features: Features | None) -> str:
    """The text to show on the node: what the model wrote, and what the user may not expect of this round."""
    notes = []
    if not result.conversation.images:
        notes.append("No picture is in view: this round is about the text alone.")
    if features is not None and features.batch > 1:
        notes.append(
            f"One message about all {features.batch} pictures. A list instead of a batch makes a round of each."
        )
    if result.truncated and result.text:
        notes.append("The text was cut off at max_new_tokens.")
    return "\n\n".join(filter(None, (result.text, *(in_page_language(f"({note})") for note in notes))))


class MingUnderstand:
    DESCRIPTION = "Answers questions about pictures, or chats in plain text."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("STRING", "MING_CONVERSATION"), ("text", "conversation")
    OUTPUT_TOOLTIPS = ("The answer.", "The conversation including this round, for the next Ming node.")
    FUNCTION = "ask"
    SEARCH_ALIASES = ("caption", "describe image", "vqa", "image to text", "chat")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": MODEL,
                "prompt": prompt("What to ask.", "Please describe the picture in detail."),
                "max_new_tokens": integer(512, 1, 4096, "Maximum answer length in tokens."),
                "temperature": number(
                    0.0, 0.0, 2.0, 0.05, "0 always picks the most likely token. Higher values give more varied answers."
                ),
                "top_p": number(
                    1.0,
                    0.01,
                    1.0,
                    0.01,
                    "Sample only from the most likely tokens that together reach this probability. "
                    "Has no effect at temperature 0.",
                    **ADVANCED,
                ),
                "seed": seed("Random seed for the answer. Has no effect at temperature 0.", changes=False, **ADVANCED),
            },
            "optional": {
                "features": socket(
                    "MING_FEATURES",
                    "Pictures to ask about. They are added to the conversation unless they are the newest ones there.",
                ),
                "conversation": CONVERSATION,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return _validate_prompt(prompt)

    def ask(
        self,
        model: host.Loaded[Engine],
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        features: Features | None = None,
        conversation: Conversation | None = None,
    ) -> tuple[str, Conversation]:
        options = TextOptions(max_new_tokens, Sampling(temperature, top_p), seed)
        plan = model.model.plan(conversation or Conversation(), prompt, options, features)
        engine = host.load_to_gpu(model, plan.working_memory)

        node_class = type(self).__name__
        result = engine.write(plan, WritingProgress(node_class, max_new_tokens))
        host.show_text(_with_notes(result, features), node_class)
        return result.text, result.conversation


DrawnLists = tuple[list[Features], list[Conversation], list[str]]


class _DrawingNode:
    """What Ming Generate and Ming Edit share."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MING_FEATURES", "MING_CONVERSATION", "STRING")
    RETURN_NAMES = ("features", "conversation", "text")
    OUTPUT_IS_LIST = (True, True, True)
    OUTPUT_TOOLTIPS = (
        "Generated picture as features (one per batch item). Connect to MingTok Decode or another Ming node.",
        "The conversation including this round (one per batch item), for the next Ming node.",
        "Text that the model wrote before or after the picture, if any.",
    )

    # Widgets of both nodes; each node has its own order.
    SEED = seed(
        "Random seed. You can reuse it for a whole chain; each round gets different noise.",
        changes=True,
    )
    BATCH = integer(1, 1, 16, "Number of pictures (seed, seed + 1, ...).")
    TEXT_GUIDANCE = number(3.0, 0.0, 20.0, 0.1, "Text guidance (CFG). 1 = off; higher follows the prompt more closely.")
    STEPS = integer(16, 1, 64, "Sampling steps per image token. Fewer is faster but coarser.", **ADVANCED)
    TEMPERATURE = number(
        1.0, 0.0, 2.0, 0.05, "Scales the initial noise. 0 gives the same picture for every seed.", **ADVANCED
    )
    SOLVER = combo(
        list(METHODS),
        "ODE solver. 8 steps of data_ab2, or 12 of ab2, are about as accurate as 16 of euler; all steps cost the same.",
        **ADVANCED,
    )
    START = combo(
        list(STARTS),
        "draw now: start the picture right away. model decides: the model may write text before it starts the picture.",
        **ADVANCED,
    )
    MAX_NEW_TOKENS = integer(
        64, 1, 4096, "Maximum length of the text before and after the picture, in tokens.", **ADVANCED
    )

    def run_round(
        self,
        model: host.Loaded[Engine],
        prompt: str,
        features: Features | None,
        conversation: Conversation | None,
        *,
        seed: int,
        batch_size: int,
        text_guidance: float,
        image_guidance: float,
        steps: int,
        temperature: float,
        solver: str,
        start: str,
        max_new_tokens: int,
        mask: torch.Tensor | None = None,
    ) -> DrawnLists:
        options = ImageOptions(
            seeds=tuple(seed + k for k in range(batch_size)),
            guidance=Guidance(text_guidance, image_guidance),
            solver=Solver(steps, solver),
            temperature=temperature,
            start=start,
            max_new_tokens=max_new_tokens,
            mask=mask,
        )
        plan = model.model.plan(conversation or Conversation(), prompt, options, features)
        engine = host.load_to_gpu(model, plan.working_memory)

        node_class = type(self).__name__
        expected_tokens = max_new_tokens + engine.config.llm_config.num_image_tokens_for_gen
        results = engine.draw(plan, DrawingProgress(node_class, expected_tokens, engine))
        host.show_text(_with_notes(results[0], features), node_class)
        return [r.features for r in results], [r.conversation for r in results], [r.text for r in results]


class MingGenerate(_DrawingNode):
    DESCRIPTION = "Draws a picture from a text description. Decode the resulting features, or edit them further."
    FUNCTION = "generate"
    SEARCH_ALIASES = ("text to image", "t2i", "draw")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": MODEL,
                "prompt": prompt("What to draw."),
                "seed": cls.SEED,
                "batch_size": cls.BATCH,
                "text_guidance": cls.TEXT_GUIDANCE,
                "steps": cls.STEPS,
                "temperature": cls.TEMPERATURE,
                "solver": cls.SOLVER,
                "start": cls.START,
                "max_new_tokens": cls.MAX_NEW_TOKENS,
                "image_guidance": number(
                    1.1,
                    0.0,
                    10.0,
                    0.05,
                    "Image guidance. 1 = off; higher follows the conversation more closely. "
                    "Has no effect without a conversation.",
                    **ADVANCED,
                ),
            },
            "optional": {"conversation": CONVERSATION},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, prompt: str | None = None) -> bool | str:
        return _validate_prompt(prompt)

    def generate(
        self,
        model: host.Loaded[Engine],
        prompt: str,
        conversation: Conversation | None = None,
        **widgets: Any,
    ) -> DrawnLists:
        return self.run_round(model, prompt, None, conversation, **widgets)


NO_PICTURE = (
    "features: there is no picture to edit; connect MingTok Semantic Features, or a conversation that contains a "
    "picture; to draw from text alone, use Ming Generate (MingGenerate)"
)


class MingEdit(_DrawingNode):
    DESCRIPTION = "Edits the picture as instructed. A chain of edits stays in feature space until you decode it."
    FUNCTION = "edit"
    SEARCH_ALIASES = ("image edit", "instruct edit", "inpaint", "multi-round edit")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": MODEL,
                "instruction": prompt("What to change. Ming Instruction has ready-made instructions."),
                "seed": cls.SEED,
                "batch_size": cls.BATCH,
                "text_guidance": cls.TEXT_GUIDANCE,
                "image_guidance": number(
                    1.1, 0.0, 10.0, 0.05, "Image guidance. 1 = off; higher stays closer to the input."
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
                    "The picture to edit; a batch goes into one message. "
                    "Added to the conversation unless it is the newest picture there.",
                ),
                "conversation": CONVERSATION,
                "mask": socket(
                    "MASK",
                    "Limits the edit to the white parts. The rest keeps its latents exactly, and is not drawn again.",
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, instruction: str | None = None) -> bool | str:
        """A missing picture is left to the run: ComfyUI shows an error on every input that is named here."""
        return _validate_prompt(instruction)

    def edit(
        self,
        model: host.Loaded[Engine],
        instruction: str,
        features: Features | None = None,
        conversation: Conversation | None = None,
        mask: torch.Tensor | None = None,
        **widgets: Any,
    ) -> DrawnLists:
        if features is None and not (conversation and conversation.images):
            raise ValueError(NO_PICTURE)
        return self.run_round(model, instruction, features, conversation, mask=mask, **widgets)
