"""What a template is made of: rows of groups of columns of nodes, and the names that nodes have on the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..nodes import NODE_DISPLAY_NAME_MAPPINGS

CORE_NAMES = {
    "SaveImage": "Save Image",
    "PreviewImage": "Preview Image",
    "PreviewAny": "Preview as Text",
    "ImageScale": "Upscale Image",
    "ImageCrop": "Image Crop",
    "ImagePadForOutpaint": "Pad Image for Outpainting",
    "ImageCompositeMasked": "Image Composite Masked",
    "SolidMask": "Create Solid Mask",
    "FeatherMask": "Feather Mask",
    "MaskComposite": "Combine Masks",
    "MaskToImage": "Convert Mask to Image",
}
NAMES = {**CORE_NAMES, **NODE_DISPLAY_NAME_MAPPINGS}
WIDTH = 290  # of a column, in pixels of the page at 100 %


class Out(NamedTuple):
    """An output of a node, as the value of another node's input."""

    node: int
    name: str


@dataclass(frozen=True)
class Node:
    """A node: what it is called beside its real name, how high its text box or image is, and its inputs."""

    id: int
    type: str
    label: str = ""
    area: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{NAMES[self.type]}: {self.label}" if self.label else NAMES[self.type]


@dataclass(frozen=True)
class Note:
    """The note of a template, as large as its text needs; it may reach under the next columns."""

    width: int
    height: int


@dataclass(frozen=True)
class Space:
    """Nothing, to bring two nodes to one height."""

    height: int


@dataclass(frozen=True)
class Column:
    nodes: tuple[Node | Note | Space, ...]
    width: int = WIDTH


@dataclass(frozen=True)
class Group:
    """Columns in a frame with a title; without a title, no frame."""

    title: str
    color: str
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Template:
    """`title` and `sentence` in English and Chinese; the note has two sentences: what it does, and what to try."""

    name: str
    title: tuple[str, str]
    sentence: tuple[str, str]
    note: tuple[str, str]
    rows: tuple[tuple[Group, ...], ...]

    @property
    def nodes(self) -> list[Node]:
        every = (n for row in self.rows for group in row for column in group.columns for n in column.nodes)
        return sorted((n for n in every if isinstance(n, Node)), key=lambda n: n.id)
