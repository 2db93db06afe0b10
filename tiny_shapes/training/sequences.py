"""Dialogues as token sequences, exactly as inference would lay them out, packed into batches.

A round is its prompt part from the chat template, then what the model emits: the answer, or `<image>` and the tokens
of a picture. The end token is predicted after either, but stands in no sequence, as in a `Conversation`.

Guidance rows are taught in the very form in which they are used: from `<image>` of the last round on, a dropped sample
sees only what `guidance_masks` leaves to that row, and counts its positions over that. The keys of the ASSISTANT tag
still know the prompt, so a dropped sample has *another* dialogue's prompt in its place: what leaks is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ming_core.conversation import ANSWER, MARK, PROMPT, Conversation, Part, Picture, Text, guidance_masks
from ming_core.features import Features
from ming_core.prompts import ChatFormat

from ..world import (
    CANVAS,
    COLORS,
    LABEL_CLASSES,
    POSITIONS,
    SHAPES,
    SIZES,
    Dialogue,
    Round,
    Scene,
    Thing,
    draw,
    mentions,
    patch_labels,
    random_dialogue,
    read_region,
)

IGNORE = -100  # nothing is asked for
# Of the flow loss of a token on a thing; 1 on plain background. A model in doubt draws a thing that much more readily
# than ground, so that with 4 it learned faster and drew things twice.
OBJECT_WEIGHT = 2.0
EDIT_WEIGHT = 4.0  # of a token where a thing stands before or after an edit: what changes and what must not, alike
# How many times as much the first token of each cell counts, whatever stands there: which thing comes is decided there,
# from the words and the picture before, while its other quarters follow the first one.
FIRST_WEIGHT = 4.0
SHORT_ANSWER = 8  # tokens: the answer to a question, not a description
SHORT_WEIGHT = 4.0  # of the text loss of its tokens, which are few and hard beside those of descriptions; 1 elsewhere
QUIZ = 6  # questions about one picture, which is most of what a question costs
PLAIN = 12  # levels of 255 by which a patch of plain background differs at most from the ground

# What there is to know of a thing, and the values of each.
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "position": tuple(POSITIONS)}

# What there is to read of a token to come, and how many classes; "edited": an edit changes it, or its region covers it.
SHOWN = {**LABEL_CLASSES, "edited": 2}

UNCONDITIONAL, TEXT_UNCONDITIONAL = 1, 2  # rows of `guidance_masks`; 0 sees everything


@dataclass(frozen=True, eq=False)
class PlacedPicture:
    """A picture in a sequence: uint8 [H, W, 3], position of its first token, and whether the model is to draw it.

    shown: int64 [kinds, N], what each token of it shows (`SHOWN`), or IGNORE; None for a picture that is not drawn.
    before: the picture that it is an edit of; None for any other.
    """

    pixels: np.ndarray
    start: int
    drawn: bool
    shown: np.ndarray | None = None
    before: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Sequence:
    """One dialogue.

    ids        token ids; the patch token where a picture's features go
    wanted     what each position must predict next, or IGNORE
    counts     how much that counts
    positions  as rotary embedding counts them
    pictures   in order
    meant      things, by the position of the token where a prompt has told them: the last one of its words for a thing,
               and, of a prompt that is about one thing, its own last one
    hidden     bool [n]: of the first n tokens those that the others, the tokens from n on, do not see
    """

    ids: list[int]
    wanted: list[int]
    counts: list[float]
    positions: list[int]
    pictures: tuple[PlacedPicture, ...]
    meant: dict[int, Thing]
    hidden: np.ndarray

    def mask(self) -> np.ndarray:
        """bool [T, T]: which token (row) sees which (column)."""
        mask = np.tril(np.ones((len(self.ids), len(self.ids)), dtype=bool))
        n = len(self.hidden)
        mask[n:, :n] &= ~self.hidden
        return mask


class Batch(NamedTuple):
    """Sequences packed into R rows of L tokens; every sequence sees only itself.

    ids, wanted, positions  int64 [R, L]
    counts                  float32 [R, L], weights of what is wanted
    mask                    bool [R, L, L]
    pictures                uint8 [P, H, W, 3], all pictures of all sequences
    drawn                   bool [P]
    slots                   int64 [P], where in the flattened rows the first token of each picture stands
    weights                 float32 [P, N], of the flow loss of each token (0 for a picture that was seen)
    shown                   int64 [P, kinds, N], what each token shows (`SHOWN`), or IGNORE
    told                    int64 [M], where in the flattened rows a prompt has told a thing
    meant                   int64 [M, 4], that thing (`ATTRIBUTES`)
    """

    ids: Tensor
    wanted: Tensor
    positions: Tensor
    counts: Tensor
    mask: Tensor
    pictures: Tensor
    drawn: Tensor
    slots: Tensor
    weights: Tensor
    shown: Tensor
    told: Tensor
    meant: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def spell(
    dialogue: Dialogue, chat: ChatFormat, grid: tuple[int, int], view: int = 0, stranger: Round | None = None
) -> Sequence:
    """Lay out a dialogue; `grid`: rows and columns of the tokens of a picture.

    With a view other than 0 the last round, which must be a drawing one, is that of a guidance row, and `stranger`
    lends its prompt: the words, and for the unconditional row the pictures too. A view that the transcript does not
    have (no picture, nothing before) is the unconditional one.
    """
    ids: list[int] = []
    following: dict[int, int] = {}  # what a position must predict next
    short: set[int] = set()  # positions that predict a short answer
    placed: list[PlacedPicture] = []
    meant: dict[int, Thing] = {}
    talk = Conversation()
    hidden = np.zeros(0, dtype=bool)
    for index, turn in enumerate(dialogue.rounds):
        row = view if index == len(dialogue.rounds) - 1 else 0
        asked = turn if row == 0 else _estranged(turn, stranger, row)
        talk = talk.extended(_prompt(chat, grid, asked), "")
        if row == 0 and turn.target_scene is not None:
            meant |= _mentioned(talk.parts[-1], turn.target_scene, len(ids), chat)
        _append(talk.parts[-1], asked.attached, ids, placed, chat.patch_id)
        if row:
            views = guidance_masks(talk.parts)
            hidden = ~views[min(row, len(views) - 1)].numpy()
        emitted = _emitted(chat, grid, turn)
        talk = talk.extended(emitted, "")
        begin = len(ids)
        _append(emitted, turn.target, ids, placed, chat.patch_id, _shows(turn, grid), _before(turn))
        if row == 0:
            if turn.meant is not None:
                meant[begin - 1] = turn.meant
            end = len(ids) if turn.target is None else begin + 1  # of a picture only `<image>` is predicted
            following |= {i - 1: ids[i] for i in range(begin, end)}
            following[len(ids) - 1] = chat.end_id
        if turn.answer is not None and len(ids) - begin <= SHORT_ANSWER:
            short |= set(range(begin - 1, len(ids)))
    wanted = [following.get(i, IGNORE) for i in range(len(ids))]
    counts = [SHORT_WEIGHT if i in short else 1.0 for i in range(len(ids))]
    n = len(hidden)
    positions = [*range(n), *range(n - int(hidden.sum()), len(ids) - int(hidden.sum()))]
    return Sequence(ids, wanted, counts, positions, tuple(placed), meant, hidden)


def _estranged(turn: Round, stranger: Round, row: int) -> Round:
    if row == UNCONDITIONAL:
        return replace(turn, prompt=stranger.prompt, attached=stranger.attached)
    return replace(turn, prompt=stranger.prompt)


def _prompt(chat: ChatFormat, grid: tuple[int, int], turn: Round) -> Part:
    return chat.prompt([turn.prompt] if turn.attached is None else [[_blank(grid, drawn=False)], turn.prompt])


def _emitted(chat: ChatFormat, grid: tuple[int, int], turn: Round) -> Part:
    if turn.target is None:
        return Part(True, (Text(chat.encode(turn.answer), ANSWER),))
    return Part(True, (Text((chat.image_open_id,), MARK), _blank(grid, drawn=True)))


def _blank(grid: tuple[int, int], drawn: bool) -> Picture:
    """A picture of which only the number of tokens matters."""
    nothing = torch.empty(1, 0)
    return Picture(Features(nothing, nothing, grid, ""), drawn)


def _mentioned(part: Part, scene: Scene, start: int, chat: ChatFormat) -> dict[int, Thing]:
    """The things of the scene that a prompt names, by the position of the last token of the words for each."""
    found = {}
    for segment in part.segments:
        if isinstance(segment, Text) and segment.kind == PROMPT:
            for end, thing in mentions(segment.text, scene):
                found[start + len(chat.encode(segment.text[:end])) - 1] = thing
        start += segment.length
    return found


def _append(
    part: Part,
    pixels: np.ndarray | None,
    ids: list[int],
    placed: list[PlacedPicture],
    patch: int,
    shown: np.ndarray | None = None,
    before: np.ndarray | None = None,
) -> None:
    """Add the tokens of a part, and its picture where it has one."""
    for segment in part.segments:
        if isinstance(segment, Text):
            ids += segment.ids
        else:
            placed.append(PlacedPicture(pixels, len(ids), segment.drawn, shown, before))
            ids += [patch] * segment.length


def _shows(turn: Round, grid: tuple[int, int]) -> np.ndarray | None:
    """What the tokens of the picture to be drawn show; little is known of one that is not just its scene (a region)."""
    if turn.target is None:
        return None
    shown = np.full((len(SHOWN), grid[0] * grid[1]), IGNORE, dtype=np.int64)
    if turn.target_scene is not None and np.array_equal(turn.target, draw(turn.target_scene)):
        known = patch_labels(turn.target_scene, grid[0])
        shown[: len(known)] = [known[name].reshape(-1) for name in LABEL_CLASSES]
    if turn.family == "edit":
        shown[-1] = _differ(turn.target, draw(turn.source_scene), grid)
    elif turn.family == "identify region":
        shown[-1] = _cells(read_region(turn.target), grid)
    return shown


def _before(turn: Round) -> np.ndarray | None:
    return draw(turn.source_scene) if turn.family == "edit" else None


@dataclass(frozen=True)
class DialogueData:
    """The stream of batches of a joint stage: picklable, and a pure function of the generator it is called with."""

    tokenizer_json: str
    grid: tuple[int, int]
    batch: int
    things: tuple[int, int]
    tasks: dict[str, float]
    rounds: int
    quizzes: float = 0.0  # share of dialogues that are QUIZ questions about one picture
    several: float = 0.0  # share of the others whose scenes have two things or more
    dropped: float = 0.15  # share of drawing samples that are guidance rows
    row_length: int = 384
    split: str = "train"

    def __call__(self, rng: np.random.Generator) -> Batch:
        chat = ChatFormat(self.tokenizer_json)
        return pack([self.sequence(rng, chat) for _ in range(self.batch)], self.row_length, self.grid)

    def sequence(self, rng: np.random.Generator, chat: ChatFormat) -> Sequence:
        dialogue = self.dialogue(rng)
        if dialogue.rounds[-1].target is None or rng.random() >= self.dropped:
            return spell(dialogue, chat, self.grid)
        view = int(rng.integers(UNCONDITIONAL, TEXT_UNCONDITIONAL + 1))
        return spell(dialogue, chat, self.grid, view, self.dialogue(rng).rounds[0])

    def dialogue(self, rng: np.random.Generator) -> Dialogue:
        if self.quizzes and rng.random() < self.quizzes:
            return random_dialogue(rng, ["question"], self.things, self.split, QUIZ)
        fewest, most = self.things
        if self.several and rng.random() < self.several:
            fewest = max(fewest, 2)
        return random_dialogue(rng, self.tasks or None, (fewest, most), self.split, self.rounds or None)


def pack(sequences: list[Sequence], row_length: int, grid: tuple[int, int]) -> Batch:
    """Longest first, each into the first row that has room for it; a longer sequence makes all rows longer."""
    length = max(row_length, *(len(s.ids) for s in sequences))
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        row = next((i for i, free in enumerate(room) if free >= len(sequence.ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(sequence)
        room[row] -= len(sequence.ids)
    ids, positions = np.zeros((2, len(rows), length), dtype=np.int64)
    wanted = np.full((len(rows), length), IGNORE, dtype=np.int64)
    counts = np.ones((len(rows), length), dtype=np.float32)
    mask = np.zeros((len(rows), length, length), dtype=bool)
    mask[:, range(length), range(length)] = True  # padding sees itself: a softmax over nothing is NaN
    pictures, slots, told, meant = [], [], [], []
    for i, row in enumerate(rows):
        begin = 0
        for sequence in row:
            end = begin + len(sequence.ids)
            ids[i, begin:end], wanted[i, begin:end] = sequence.ids, sequence.wanted
            positions[i, begin:end], counts[i, begin:end] = sequence.positions, sequence.counts
            mask[i, begin:end, begin:end] = sequence.mask()
            pictures += sequence.pictures
            slots += [i * length + begin + picture.start for picture in sequence.pictures]
            told += [i * length + begin + place for place in sequence.meant]
            meant += [attributes(thing) for thing in sequence.meant.values()]
            begin = end
    return Batch(
        *(torch.from_numpy(array) for array in (ids, wanted, positions, counts, mask)),
        torch.from_numpy(np.stack([p.pixels for p in pictures]))
        if pictures
        else torch.empty(0, 1, 1, 3, dtype=torch.uint8),
        torch.tensor([p.drawn for p in pictures], dtype=torch.bool),
        torch.tensor(slots, dtype=torch.long),
        torch.from_numpy(np.stack([token_weights(p, grid) for p in pictures]))
        if pictures
        else torch.empty(0, grid[0] * grid[1]),
        _shown(pictures, grid),
        torch.tensor(told, dtype=torch.long),
        torch.tensor(meant, dtype=torch.long).reshape(-1, len(ATTRIBUTES)),
    )


def attributes(thing: Thing) -> list[int]:
    """Where each of its attributes stands among the values of `ATTRIBUTES`."""
    return [values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()]


def _shown(pictures: list[PlacedPicture], grid: tuple[int, int]) -> Tensor:
    shown = np.full((len(pictures), len(SHOWN), grid[0] * grid[1]), IGNORE, dtype=np.int64)
    for place, picture in zip(shown, pictures, strict=True):
        if picture.shown is not None:
            place[:] = picture.shown
    return torch.from_numpy(shown)


def token_weights(picture: PlacedPicture, grid: tuple[int, int]) -> np.ndarray:
    """float32 [N]: how much the flow loss of each token counts; most of a picture is plain ground, soon learned, and
    most of an edit is copied."""
    if not picture.drawn:
        return np.zeros(grid[0] * grid[1], dtype=np.float32)
    ground = np.median(picture.pixels.reshape(-1, 3), axis=0)
    standing = _differ(picture.pixels, ground, grid)
    weights = np.where(standing, OBJECT_WEIGHT, 1.0)
    if picture.before is not None:
        stood = _differ(picture.before, ground, grid)
        if not stood.all():  # as on another background
            weights[standing | stood] = EDIT_WEIGHT
    weights[_first_tokens(grid)] *= FIRST_WEIGHT
    return weights.astype(np.float32)


def _first_tokens(grid: tuple[int, int]) -> list[int]:
    """The first token of each cell of the world: the upper left quarter of a thing.

    The middle of a cell is where four tokens meet: a pixel above and to the left of it lies the first.
    """
    rows, columns = grid
    return [int((y - 1) * rows / CANVAS) * columns + int((x - 1) * columns / CANVAS) for x, y in POSITIONS.values()]


def _differ(picture: np.ndarray, other: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool [N]: tokens in which any pixel of a picture, uint8 [H, W, 3], is far from the other picture, or colour."""
    return _cells((np.abs(picture.astype(np.int16) - other) > PLAIN).any(-1), grid)


def _cells(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """bool [N]: tokens in which any of the pixels, bool [H, W], is true."""
    height, width = (side // n for side, n in zip(pixels.shape, grid, strict=True))
    return pixels.reshape(grid[0], height, grid[1], width).any((1, 3)).reshape(-1)
