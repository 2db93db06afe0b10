"""The chat template, the special tokens, and text to token ids and back.

A prompt is `<role>HUMAN</role>` + images and text + `<role>ASSISTANT</role>`; an image is `<image>`, its patches,
`</image>` and a line break. Special tokens are placed by this file alone: what a user types is encoded by a
tokenizer that takes them for plain text, so `<image>` in a prompt is seven characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .conversation import ANSWER, MARK, PROMPT, ROLE, Image, Part, Segment, Text
from .text_tokenizer import FETCH, TOKENIZER, TOKENIZER_CONFIG, read_tokenizer

HUMAN, ASSISTANT = "HUMAN", "ASSISTANT"
END, ROLE_OPEN, ROLE_CLOSE = "<|endoftext|>", "<role>", "</role>"
PIECE = 1 << 16  # characters of a long text that are tokenized at once to see whether it can fit at all
PIECE_MARGIN = 256  # tokens that cutting a text there may add
PATCH, IMAGE_OPEN, IMAGE_CLOSE = "<imagePatch>", "<image>", "</image>"


class ChatFormat:
    """Text tokenizer and chat template of one checkpoint.

    Raises ValueError for a tokenizer that lacks one of the special tokens, or that makes one of what a user types; it
    names the token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # a special token that a user types is encoded as the text that it is
        tokenizer.no_truncation()  # a file records how it was used last: nothing is cut here, nor padded
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        self.end_id = self._special(END)
        self.role_open_id, self.role_close_id = self._special(ROLE_OPEN), self._special(ROLE_CLOSE)
        self.image_open_id, self.image_close_id = self._special(IMAGE_OPEN), self._special(IMAGE_CLOSE)
        self.patch_id = self._special(PATCH)
        unknown = getattr(tokenizer.model, "unk_token", None)  # what a vocabulary lacks may become this one
        self._never_typed = frozenset(i for token, i in self._special_ids.items() if token != unknown)
        for token in self._special_ids:
            self.encode(token)  # raises for a vocabulary that has special tokens as words

    @classmethod
    def from_json(cls, tokenizer_json: str) -> ChatFormat:
        """The tokenizer in the text of a tokenizer.json."""
        return cls(Tokenizer.from_str(tokenizer_json))

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatFormat:
        """Read the tokenizer files of a checkpoint folder: tokenizer.json, and tokenizer_config.json where it is there.

        Special tokens may stand in either. Raises ValueError with the remedy.
        """
        tokenizer = read_tokenizer(Path(folder))
        try:
            return cls(tokenizer)
        except ValueError as error:
            lacks = "" if (Path(folder) / TOKENIZER_CONFIG).exists() else f" ({TOKENIZER_CONFIG} is missing)"
            raise ValueError(f"{Path(folder) / TOKENIZER}: {error}{lacks}; {FETCH}") from None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, none of them special whatever the text says.

        Raises ValueError where the tokenizer is one whose plain text gives special tokens.
        """
        ids = tuple(self.tokenizer.encode(whole_characters(text), add_special_tokens=False).ids)
        if typed := self._never_typed.intersection(ids):
            token = self.tokenizer.id_to_token(min(typed))
            raise ValueError(f"this tokenizer makes the special token {token} of plain text: get the model's own")
        return ids

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as the model is to write it: not normalized, which is for what people type."""
        if self.tokenizer.normalizer is None:
            return self.encode(text)
        splitter = self.tokenizer.pre_tokenizer
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)] if splitter else [text]
        return tuple(token.id for piece in pieces for token in self.tokenizer.model.tokenize(piece))

    def exceeds(self, text: str, tokens: int) -> bool:
        """Whether a long text surely takes more than this many tokens; found piece by piece, so that memory is bounded.

        False for a text that may fit.
        """
        if len(text) <= PIECE:
            return False
        count = 0
        for start in range(0, len(text), PIECE):
            count += len(self.encode(text[start : start + PIECE])) - PIECE_MARGIN
            if count > tokens:
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def prompt(self, contents: Sequence[str | Sequence[Image]]) -> Part:
        """One message of the user: texts, and lists of images, in order, with the tags around it."""
        segments: list[Segment] = [self._tag(HUMAN)]
        pending = ""
        for content in contents:
            if isinstance(content, str):
                pending += content
                continue
            for i, image in enumerate(content):
                pending += "\n" if i else ""  # between the images of one list
                segments += self._text(pending)
                segments += [
                    Text((self.image_open_id,), MARK, IMAGE_OPEN),
                    image,
                    Text((self.image_close_id,), MARK, IMAGE_CLOSE),
                ]
                pending = "\n"
        return Part(False, (*segments, *self._text(pending), self._tag(ASSISTANT)))

    def answer(self, emitted: Sequence[int], forwarded: int | None = None) -> Text:
        """What the model said: the first `forwarded` of the emitted tokens (None: all), and the text of all of them.

        The last token of an answer was never forwarded, so it belongs to the text for people alone.
        """
        return Text(tuple(emitted[:forwarded]), ANSWER, self.decode(emitted))

    def _special(self, token: str) -> int:
        if token not in self._special_ids:
            raise ValueError(f"the tokenizer has no special token {token}: it belongs to another model")
        return self._special_ids[token]

    def _tag(self, role: str) -> Text:
        return Text((self.role_open_id, *self.encode(role), self.role_close_id), ROLE, f"<role>{role}</role>")

    def _text(self, text: str) -> list[Text]:
        text = whole_characters(text)
        ids = self.encode(text)
        return [Text(ids, PROMPT, text)] if ids else []


def whole_characters(text: str) -> str:
    """The text with its halves of characters (lone surrogates) replaced: no tokenizer and no file takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextStream:
    """Token ids to text as they come; a character appears when all of its bytes are there."""

    def __init__(self, chat: ChatFormat) -> None:
        self._tokenizer = chat.tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self.text = ""

    def push(self, token_id: int) -> str:
        """Returns all text so far."""
        self.text += self._stream.step(self._tokenizer, token_id) or ""
        return self.text
