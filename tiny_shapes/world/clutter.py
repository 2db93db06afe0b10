"""What people type around a prompt, and what lies outside the world.

`cluttered` adds what other image models are used to, or what changes nothing: politeness, praise, weights, LoRA tags,
comments, emoji, words that nobody knows. Half of the vocabulary is kept for evaluation (`unseen`), and random words are
made up, so that the model learns to pass over what it does not know rather than a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .descriptions import join_words
from .phrasing import pick
from .scenes import COLORS, SHAPES

# For each kind of clutter the vocabulary of training and that of evaluation.
_Words = tuple[tuple[str, ...], tuple[str, ...]]
_POLITE: _Words = (
    ("please", "could you please", "can you", "hey,", "hi!", "I want you to", "now", "ok,", "I would like you to"),
    ("would you kindly", "hello there,", "let's", "I'd love you to", "so,", "next,"),
)
_THANKS: _Words = (
    ("please", "thanks", "thank you!", "for me", "if you can", "right now", "ok?"),
    ("cheers", "many thanks!", "pretty please", "as soon as you can", "will you?"),
)
_PRAISE: _Words = (
    (
        *("8k", "masterpiece", "best quality", "highly detailed", "trending on artstation", "sharp focus", "4k"),
        *("cinematic lighting", "professional", "intricate", "award winning", "vector art", "flat design", "HDR"),
    ),
    (
        *("ultra detailed", "uhd", "octane render", "unreal engine 5", "studio lighting", "photorealistic"),
        *("concept art", "minimalist", "digital painting", "depth of field", "16k", "bokeh"),
    ),
)
_ADJECTIVES: _Words = (
    (
        "beautiful",
        "nice",
        "shiny",
        "cute",
        "perfect",
        "simple",
        "glowing",
        "bright",
        "cool",
        "pretty",
        "flat",
        "lovely",
    ),
    ("gorgeous", "neat", "elegant", "fancy", "glossy", "tidy", "amazing", "charming", "magic", "smooth"),
)
_EMOJI: _Words = (
    ("😀", "🙏", "🔥", "✨", "❤️", "👍", "🎨", "😂", "🙂", "💯"),
    ("😎", "🚀", "🌈", "🥰", "👀", "🎉", "🤖", "⭐"),
)
_COMMENTS: _Words = (
    ("// test", "# draft", "(no rush)", "--ar 1:1", "-- v2", "/* todo */", "BREAK", "[1]", "--no text", "(second try)"),
    ("// final version", "# todo", "(just for fun)", "--seed 7", "-- q 2", "; end", "--style raw", "(again)"),
)
_LORAS: _Words = (
    ("<lora:detail:0.8>", "<lora:x:1>", "<lora:add_more:0.5>", "<lora:style_v2:1.2>", "embedding:easy"),
    ("<lora:shapes:1>", "<lora:flat_colors:0.7>", "<lora:lcm:0.3>", "embedding:goodhands"),
)
_PARAMETERS: _Words = (
    ("\nNegative prompt: blurry, low quality", "\nSteps: 20, Sampler: Euler a, CFG scale: 7", "\nnegative: ugly"),
    ("\nNegative prompt: bad anatomy, watermark", "\nSteps: 30, Sampler: DPM++ 2M, Seed: 42", "\nnegative: jpeg"),
)
_WEIGHTS = ("1.1", "1.2", "1.3", "0.9", "1.05", "0.8", "1.5")
_SYLLABLES = (
    "ba",
    "do",
    "fi",
    "gra",
    "ka",
    "lum",
    "mi",
    "no",
    "pex",
    "qua",
    "ri",
    "sto",
    "tu",
    "vo",
    "wen",
    "xi",
    "zu",
)

_NAMED = re.compile(rf"\b({'|'.join((*COLORS, *SHAPES))})\b", re.IGNORECASE)
_AN_OBJECT = re.compile(rf"\b(an?|the) (?=(?:{'|'.join((*COLORS, *SHAPES))})\b)", re.IGNORECASE)


def made_up_word(rng: np.random.Generator) -> str:
    """A word that no language has, such as "lumzu"."""
    return "".join(pick(rng, _SYLLABLES) for _ in range(int(rng.integers(2, 4))))


def cluttered(rng: np.random.Generator, prompt: str, unseen: bool = False) -> str:
    """The prompt with one to three additions that change nothing of what it means.

    unseen: from the vocabulary that is kept for evaluation.
    """
    for _ in range(int(rng.choice((1, 2, 3), p=(0.6, 0.3, 0.1)))):
        prompt = pick(rng, _WAYS)(rng, prompt, unseen)
    return prompt


def retyped(rng: np.random.Generator, prompt: str) -> str:
    """The same words typed another way: in capitals, full-width letters, with tabs, no-break spaces or curly quotes."""
    return pick(rng, _TYPINGS)(prompt)


_TYPINGS: tuple[Callable[[str], str], ...] = (
    str.upper,
    str.title,
    lambda text: text.replace(" ", "\t"),
    lambda text: f"\n{text.replace(' ', chr(0xA0))}  ",
    lambda text: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
    lambda text: text.replace(" ", chr(0x3000)),
)


def _before(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    return f"{pick(rng, _POLITE[unseen])} {prompt[:1].lower()}{prompt[1:]}"


def _thanks(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    return f"{prompt.rstrip('.')}{pick(rng, (' ', ', ', '. '))}{pick(rng, _THANKS[unseen])}"


def _praise(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    words = _some(rng, _PRAISE[unseen], 4)
    if rng.random() < 0.25:
        return f"{', '.join(words)}, {prompt}"
    return f"{prompt.rstrip('.')}, {', '.join(words)}"


def _adjective(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    """An adjective before an object, "a shiny red circle"; where no object is named, a made-up word at the end."""
    word = pick(rng, _ADJECTIVES[unseen]) if rng.random() < 0.7 else made_up_word(rng)
    objects = list(_AN_OBJECT.finditer(prompt))
    if not objects:
        return f"{prompt} {word}"
    end = pick(rng, objects).end()
    text = f"{prompt[:end]}{word} {prompt[end:]}"
    return re.sub(r"\ban (?=[^aeiou])", "a ", re.sub(r"\ba (?=[aeiou])", "an ", text))


def _emoji(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    signs = "".join(_some(rng, _EMOJI[unseen], 3))
    return f"{signs} {prompt}" if rng.random() < 0.3 else f"{prompt}{pick(rng, (' ', ''))}{signs}"


def _comment(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    return f"{prompt} {pick(rng, _COMMENTS[unseen])}"


def _lora(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    tag = pick(rng, _LORAS[unseen])
    return f"{tag} {prompt}" if rng.random() < 0.4 else f"{prompt}{pick(rng, (' ', ', '))}{tag}"


def _parameters(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    return prompt + pick(rng, _PARAMETERS[unseen])


def _weight(rng: np.random.Generator, prompt: str, unseen: bool) -> str:
    """A weight on a color or a shape, "(red:1.2)" or "((red))"; where none is named, the prompt as it is."""
    named = list(_NAMED.finditer(prompt))
    if not named:
        return prompt
    word = pick(rng, named)
    forms = [f"({word[0]}:{pick(rng, _WEIGHTS)})", f"({word[0]}:{rng.uniform(0.5, 2):.1f})"]
    form = pick(rng, (*forms, f"[{word[0]}]" if unseen else f"(({word[0]}))", f"({word[0]})"))
    return prompt[: word.start()] + form + prompt[word.end() :]


def _some(rng: np.random.Generator, words: Sequence[str], most: int) -> list[str]:
    """One to `most` of the words, no two alike."""
    return [words[i] for i in rng.permutation(len(words))[: int(rng.integers(1, most + 1))]]


_WAYS = (_before, _thanks, _praise, _adjective, _emoji, _comment, _lora, _parameters, _weight, _weight)


# --- Outside the world ----------------------------------------------------------------------------------------------

# What the model says when it is asked for what it does not know.
OUTSIDE = f"I only know a world of colored shapes: {join_words(SHAPES)}."

_THINGS: _Words = (
    (
        *("cat", "dog", "horse", "tree", "house", "car", "mountain", "river", "bird", "flower", "person", "woman"),
        *("man", "child", "city", "castle", "robot", "dragon", "boat", "airplane", "apple", "table", "chair", "cup"),
        *("book", "sunset", "landscape", "portrait", "fish", "bear", "bicycle", "spaceship", "forest", "beach"),
        *("lion", "monkey", "guitar", "pizza", "cake", "hand", "face", "girl", "boy", "king", "bridge", "road"),
    ),
    (
        *("elephant", "rabbit", "train", "lake", "garden", "tiger", "banana", "clock", "wizard", "tower", "ship"),
        *("street", "queen", "violin", "burger", "shoe", "island", "penguin", "lamp", "astronaut"),
    ),
)
_SETTINGS = ("", "", "", "", " in the snow", " at night", " on a hill", " with a hat", " in the style of van gogh")
_DRAW_THINGS = (
    *("Draw {thing}.", "{thing}", "a picture of {thing}", "Please draw {thing}", "an image of {thing}"),
    *("Generate an image of {thing}", "Show me {thing}", "a photo of {thing}", "Add {thing}.", "Make it {thing}."),
    "Please generate the corresponding image based on the description. {thing}",
)
_TALK: _Words = (
    (
        *("What is the weather today?", "Who is the president of France?", "Tell me a joke.", "Write a poem."),
        *("What is two plus two?", "Translate this into German.", "Who wrote Hamlet?", "What time is it?"),
        *("Write some Python code.", "How do I cook rice?", "What is the capital of Spain?", "Sing me a song."),
        *("Tell me a story.", "How old are you?", "What is the meaning of life?", "Play some music."),
    ),
    (
        *("What is the capital of Italy?", "Who painted the Mona Lisa?", "Write a story.", "Tell me the news."),
        *("How do I bake bread?", "What is ten times ten?", "Translate this into French.", "What day is it?"),
    ),
)


def outside(rng: np.random.Generator, unseen: bool = False) -> str:
    """A request that is not about this world, such as "Draw a cat.". `OUTSIDE` answers it.

    unseen: with words that are kept for evaluation.
    """
    if rng.random() < 0.25:
        return pick(rng, _TALK[unseen])
    noun = pick(rng, _THINGS[unseen])
    if not unseen and rng.random() < 0.2:
        noun = made_up_word(rng)
    article = f"{'an' if noun[0] in 'aeiou' else 'a'} " if rng.random() < 0.8 else ""
    adjective = f"{pick(rng, _ADJECTIVES[unseen])} " if rng.random() < 0.15 else ""
    if adjective and article:
        article = "an " if adjective[0] in "aeiou" else "a "
    return pick(rng, _DRAW_THINGS).format(thing=f"{article}{adjective}{noun}{pick(rng, _SETTINGS)}")


VOCABULARIES: Mapping[str, _Words] = MappingProxyType(
    {
        **{"polite": _POLITE, "thanks": _THANKS, "praise": _PRAISE, "adjectives": _ADJECTIVES, "emoji": _EMOJI},
        **{"comments": _COMMENTS, "loras": _LORAS, "parameters": _PARAMETERS, "things": _THINGS, "talk": _TALK},
    }
)
