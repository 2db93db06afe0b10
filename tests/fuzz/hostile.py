"""What may land in a file, a prompt or a socket: hypothesis strategies that make and spoil values.

Each strategy makes one change, so that a test that fails shows the smallest one. `said_in_words` says what an error has
to be.
"""

from __future__ import annotations

import contextlib
import copy
import json
import linecache
import re
import time
import traceback
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from ming_univision.tests.comfyui.finding import PACK

PYTHONS_WORDS = re.compile(
    r"object is not|unsupported operand|has no attribute|positional argument|NoneType|size of tensor|codec can't|"
    r"unhashable|__\w+__|Traceback|expected string or bytes|not subscriptable|has no len|mat1"
)
MOST_SECONDS = 8  # of processor time for one example, most of which take a hundredth of it
LONGEST = 4000  # characters of a message that a person can still read


def examples(count: int) -> settings:
    """Settings for that many examples, the same ones everywhere."""
    return settings(
        max_examples=count,
        derandomize=True,  # nothing is kept between runs either
        deadline=None,  # machines differ; `said_in_words` bounds the time on the processor
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # an example is one change, and shrinking it would take minutes
        print_blob=False,
    )


class Raw(str):
    """JSON text that stands in a tree as it is, for what `json.dumps` does not write."""


NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    64,
    1000,
    2**20,
    0.5,
    1.5,
    -0.5,
    1e-300,
    1e308,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
)
TEXTS = ("", " ", "0", "-1", "nan", "None", "../x", "a\0b", "\ud800", "x" * 5000, "<image>", "a\nb", "%s {0}", "\ufeff")
CONTAINERS: tuple[Any, ...] = ([], {}, [1], [None], [[]], {"a": 1}, [0, 0], ["a", "b"])
NO_JSON_OF_OURS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "9" * 5000,
    "-0.0",
    "[" * 5000 + "]" * 5000,
    '{"a":' * 900 + "1" + "}" * 900,
)

json_values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from((None, True, False)),
    st.sampled_from(CONTAINERS),
    st.sampled_from([Raw(text) for text in NO_JSON_OF_OURS]),
)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=20,
)


def dumped(tree: Any) -> bytes:
    """JSON of a tree that may hold Raw."""
    raws: list[str] = []

    def hidden(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"@raw{len(raws) - 1}@"
        if isinstance(value, dict):
            return {key: hidden(inner) for key, inner in value.items()}
        return [hidden(inner) for inner in value] if isinstance(value, list) else value

    text = re.sub(r'"@raw(\d+)@"', lambda found: raws[int(found[1])], json.dumps(hidden(tree)))
    return text.encode("utf-8", "surrogatepass")


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON tree."""
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from places(tree[key])


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON tree with one change: a value, a missing, renamed or copied entry, one level more."""
    tree = copy.deepcopy(tree)
    container, key = draw(st.sampled_from(list(places(tree))))
    change = draw(st.sampled_from(("value", "value", "value", "none", "copy", "rename", "nest")))
    if change == "value":
        container[key] = draw(json_values)
    elif change == "none":
        del container[key]
    elif change == "copy":
        other, place = draw(st.sampled_from(list(places(tree))))
        container[key] = copy.deepcopy(other[place])
    elif change == "rename" and isinstance(container, dict):
        container[draw(st.sampled_from(TEXTS))] = container.pop(key)
    else:
        container[key] = [container[key]]
    return tree


@st.composite
def flipped(draw: st.DrawFn, data: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """The same bytes with one to five bits changed in data[start:stop]."""
    spoiled = bytearray(data)
    for _ in range(draw(st.integers(1, 5))):
        spoiled[draw(st.integers(start, (stop or len(data)) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(spoiled)


@st.composite
def broken_text(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON text in another encoding, cut, doubled, or damaged."""
    at = draw(st.integers(0, len(data)))
    ways = (
        b"\xef\xbb\xbf" + data,
        data.decode().encode("utf-16"),
        data[:at] + b"\xe9\xff" + data[at:],
        data[:at],
        data[:at] + b"\0" * 20 + data[at:],
        data.replace(b"{", b"{ // x\n", 1),
        data.replace(b'"', b"'"),
        data + data,
        b"[" + data + b"]",
        b"[" * 100_000,
        data.replace(b"{", b'{"n":' + b"7" * 5000 + b",", 1),
    )
    return draw(st.sampled_from(ways) | flipped(data))


@st.composite
def changed_json(draw: st.DrawFn, tree: Any) -> bytes:
    """The text of a JSON file that is not quite `tree`."""
    return draw(changed_tree(tree).map(dumped) | broken_text(dumped(tree)) | any_json.map(dumped))


# --- safetensors --------------------------------------------------------------------------------------------------


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    """(header, tensors) of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


@st.composite
def changed_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with another header, or another end; its tensors are as they were."""
    header, tensors = taken_apart(data)
    start = len(data) - len(tensors)
    lengths = (0, 1, start - 9, start - 7, 2**63, 2**64 - 1, 1 << 40, len(data))
    ways = (
        changed_json(header).map(lambda text: put_together(text, tensors)),
        st.sampled_from(lengths).map(lambda length: length.to_bytes(8, "little") + data[8:]),
        st.integers(0, len(data)).map(lambda size: data[:size]),
        st.sampled_from((b"\0", b"x" * 7, b"\0" * 4096)).map(lambda more: data + more),
        flipped(data, 0, start),
    )
    return draw(st.one_of(ways))


FILLS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\0\0\0\x3f")  # of float32


@st.composite
def changed_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file with other numbers in one tensor."""
    header, tensors = taken_apart(data)
    start = len(data) - len(tensors)
    name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    begin, end = (start + offset for offset in header[name]["data_offsets"])
    fill = draw(
        st.sampled_from((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\0\0\0\x3f"))
    )
    first = draw(st.booleans())
    values = fill + data[begin + 4 : end] if first else fill * ((end - begin) // 4)
    return draw(st.just(data[:begin] + values + data[end:]) | flipped(data, begin, end))


# --- Errors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def said_in_words(*kinds: type[Exception]) -> Iterator[list[Exception]]:
    """Lets pass an error of these kinds that the pack raises by itself, in words for people; it is put in the list.

    What runs inside may take MOST_SECONDS of processor time.
    """
    caught: list[Exception] = []
    began = time.process_time()
    try:
        yield caught
    except kinds as error:
        caught.append(error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = str(error)
        assert where.filename.startswith(str(PACK)), f"not by us, but in {where.filename}: {message}"
        assert linecache.getline(where.filename, where.lineno).lstrip().startswith("raise"), f"at {where}: {message}"
        assert is_for_people(message), message[:500]
    assert time.process_time() - began < MOST_SECONDS


def is_for_people(message: str) -> bool:
    message = message.replace("__metadata__", "")  # an entry of safetensors files
    return bool(message.strip()) and len(message) <= LONGEST and not PYTHONS_WORDS.search(message)
