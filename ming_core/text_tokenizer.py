"""Reads the text tokenizer of a checkpoint folder: tokenizer.json, and what is beside it.

The published model keeps these files beside its code, not beside its weights, so a folder may well lack them. Special
tokens may stand in tokenizer.json or only in tokenizer_config.json; the ids that either states are kept, and two that
contradict each other are an error.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .json_files import FileError, read_file, read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
NAMES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")  # no others are read
MAX_BYTES = 64 << 20  # twice the longest tokenizer.json in use, that of a vocabulary of 262,144
MAX_ID = 1 << 24  # sixty times the largest vocabulary in use
SOURCE = "the folder mingunivision of https://github.com/inclusionAI/Ming-UniVision"
FETCH = f"copy {TOKENIZER} and {TOKENIZER_CONFIG} from {SOURCE} into that folder, or have quickstart.py download do it"


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder. Raises FileError that says which files to fetch from where."""
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        raise FileError(f"{path} is missing: the published model keeps its tokenizer beside its code; {FETCH}")
    contents = {name: _content(folder / name) for name in NAMES if os.path.lexists(folder / name)}
    stated = _stated_ids(folder / TOKENIZER_CONFIG, contents.get(TOKENIZER_CONFIG, {}))
    _check_ids(path, contents[TOKENIZER], stated)
    _check_sizes(path, contents[TOKENIZER])
    tokenizer = _tokenizer(path, contents)
    if any(tokenizer.token_to_id(token) != i for token, i in stated.items()):
        # the library numbers added tokens from the end of the vocabulary on: where there are gaps, the vocabulary
        # itself has to have them
        _add_to_vocabulary(path, contents[TOKENIZER], stated)
        tokenizer = _tokenizer(path, contents)
    for token, i in (_ids(contents[TOKENIZER]) | stated).items():
        found = tokenizer.token_to_id(token)
        if found != i:
            raise FileError(f"{path}: the token {_shown(token)} gets the id {found}, not {i}: {FETCH}")
    return tokenizer


def tokenizer_files(folder: str | Path) -> dict[str, str]:
    """The texts of a folder's tokenizer files by name, as saving a model takes them. Raises FileError."""
    names = sorted({*(path.name for path in Path(folder).glob("tokenizer*.json")), *NAMES})
    there = [Path(folder) / name for name in names if os.path.lexists(Path(folder) / name)]
    try:
        return {path.name: read_file(path, max_bytes=MAX_BYTES).decode("utf-8") for path in there}
    except UnicodeDecodeError as error:
        raise FileError(f"a tokenizer file in {folder} is not UTF-8 text (byte {error.start}): {FETCH}") from None


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path, max_bytes=MAX_BYTES, remedy=FETCH)
    if not isinstance(content, dict):
        raise FileError(f"{path} cannot be used (it is not a JSON object): {FETCH}")
    return content


def _tokenizer(path: Path, contents: Mapping[str, dict[str, Any]]) -> Tokenizer:
    """What the library makes of these files. It sees copies: it would open whatever else is in the folder."""
    from transformers import PreTrainedTokenizerFast  # two seconds: only when a model is loaded

    settings = contents.get(TOKENIZER_CONFIG, {})  # without the names of further files, which it would open
    settings = {k: v for k, v in settings.items() if not k.endswith(("_file", "_object")) and k != "auto_map"}
    try:
        with tempfile.TemporaryDirectory(prefix="tokenizer") as copies:
            for name, content in {**contents, TOKENIZER_CONFIG: settings}.items():
                (Path(copies) / name).write_text(json.dumps(content), encoding="utf-8")
            return PreTrainedTokenizerFast.from_pretrained(copies, local_files_only=True).backend_tokenizer
    except OSError as error:
        raise FileError(f"{path} cannot be used ({error.strerror or error}): free space for temporary files") from error
    except BaseException as error:  # tokenizers raises plain Exception and, where it panics, none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        # of the library's own errors, only plain ones are meant to be read
        reason = str(error)[:200] if type(error) is Exception else "the tokenizers library does not take it"
        raise FileError(f"{path} cannot be used ({reason}): {FETCH}") from error


def _stated_ids(path: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, as added_tokens_decoder of a tokenizer_config.json has them."""
    entries = config.get("added_tokens_decoder") or {}
    stated: dict[str, int] = {}
    for i, entry in entries.items() if isinstance(entries, dict) else [("", None)]:
        token = entry.get("content") if isinstance(entry, dict) else None
        if not (isinstance(token, str) and i.isascii() and i.isdecimal() and len(i) < 10) or token in stated:
            raise FileError(f"{path} cannot be used (added_tokens_decoder is not a list of tokens by id): {FETCH}")
        stated[token] = int(i)
    return stated


def _ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the added tokens of a tokenizer.json."""
    added = content.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {
        token["content"]: token["id"]
        for token in tokens
        if isinstance(token.get("content"), str) and type(token.get("id")) is int
    }


def _vocabulary(content: Mapping[str, Any]) -> dict[str, int]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary if isinstance(vocabulary, dict) else {}


def _check_ids(path: Path, content: Mapping[str, Any], stated: Mapping[str, int]) -> None:
    """The two files must not give one token two ids, or two tokens one."""
    known = {**_vocabulary(content), **_ids(content)}
    tokens = {i: token for token, i in known.items() if type(i) is int}
    for token, i in stated.items():
        if known.get(token, i) != i:
            there = f"gives it the id {known[token]}"
        elif tokens.get(i, token) != token:
            there = f"gives that id to {_shown(tokens[i])}"
        else:
            continue
        raise FileError(
            f"{path.with_name(TOKENIZER_CONFIG)} gives the token {_shown(token)} the id {i}, but {TOKENIZER} {there}: "
            f"the two files belong to different checkpoints; {FETCH}"
        )


def _check_sizes(path: Path, content: Mapping[str, Any]) -> None:
    """The library asks for memory by what a file says, and ends the process where there is not as much."""
    ids = {**_vocabulary(content), **_ids(content)}
    wrong = next((token for token, i in ids.items() if type(i) is not int or not 0 <= i < MAX_ID), None)
    if wrong is not None:
        raise FileError(f"{path}: the token {_shown(wrong)} has the id {str(ids[wrong])[:40]}: {FETCH}")
    places: list[Any] = [content.get("normalizer")]
    while places:
        place = places.pop()
        if isinstance(place, dict):
            if not _is_sound_charsmap(place.get("precompiled_charsmap", "")):
                raise FileError(f"{path}: its normalizer has a precompiled_charsmap that is damaged: {FETCH}")
            places += place.values()
        elif isinstance(place, list):
            places += place


def _is_sound_charsmap(text: Any) -> bool:
    """Whether a table of characters, in base64, is not longer than it is: its first four bytes say how long."""
    try:
        data = base64.b64decode(text or "")
    except (TypeError, ValueError):
        return False
    return not data or int.from_bytes(data[:4], "little") <= len(data) - 4


def _add_to_vocabulary(path: Path, content: dict[str, Any], stated: Mapping[str, int]) -> None:
    vocabulary = _vocabulary(content)
    if not vocabulary:
        raise FileError(f"{path}: its kind of vocabulary has no place for the ids of {TOKENIZER_CONFIG}: {FETCH}")
    for token, i in stated.items():
        vocabulary.setdefault(token, i)


def _shown(token: str) -> str:
    return token[:60]
