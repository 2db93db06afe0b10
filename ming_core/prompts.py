"""The chat template, the special tokens, and text to token ids and back.

A prompt is `<role>HUMAN</role>` + images and text + `<role>ASSISTANT</role>`; an image is `<image>`, its patches,
`</image>` and a line break. Special tokens are placed by this file alone: what a user types is encoded by a
tokenizer that takes them for plain text, so `<image>` in a prompt is seven characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from .conversation import ANSWER, MARK, PROMPT, ROLE, Image, Part, Segment, Text

HUMAN, ASSISTANT = "HUMAN", "ASSISTANT"
END, ROLE_OPEN, ROLE_CLOSE = "<|endoftext|>", "<role>", "</role>"
PATCH, IMAGE_OPEN, IMAGE_CLOSE = "<imagePatch>", "<image>", "</image>"
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder contains for a character whose bytes are not all there


class ChatFormat:
    """Tokenizer and chat template of one checkpoint.

    tokenizer_json: the text of its tokenizer.json. Raises ValueError, naming what is missing.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.encode_special_tokens = True  # as the text that they are
        tokenizer.no_truncation()  # a file says how it was used last: nothing is cut here, nor filled up
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: i for i, token in added.items() if token.special}
        self.end_id = self._special(END)
        self.role_open_id, self.role_close_id = self._special(ROLE_OPEN), self._special(ROLE_CLOSE)
        self.image_open_id, self.image_close_id = self._special(IMAGE_OPEN), self._special(IMAGE_CLOSE)
        self.patch_id = self._special(PATCH)

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatFormat:
        """Read tokenizer.json of a checkpoint folder. Raises ValueError with the remedy."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the tokenizer files of the checkpoint into its folder")
        try:
            return cls(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{path} cannot be used ({error}): download it again") from error

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text, none of them special whatever the text says."""
        return tuple(self._tokenizer.encode(whole_characters(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

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

    def answer(self, ids: Sequence[int]) -> Text:
        return Text(tuple(ids), ANSWER, self.decode(ids))

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
        self._chat = chat
        self._ids: list[int] = []
        self._context, self._shown = 0, 0  # where decoding starts, and up to where the ids are in `text`
        self.text = ""

    def push(self, token_id: int) -> str:
        """Returns all text so far."""
        self._ids.append(token_id)
        before = self._chat.decode(self._ids[self._context : self._shown])
        after = self._chat.decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self.text += after[len(before) :]
            self._context, self._shown = self._shown, len(self._ids)
        return self.text
