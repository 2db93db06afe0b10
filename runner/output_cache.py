"""The outputs of the last workflow, cached by content as in ComfyUI's classic cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .execution import NodeResult, constant_inputs, map_inputs
from .workflow import Node, is_link

log = logging.getLogger(__name__)


@dataclass(eq=False)  # compared and hashed by identity, so that one entry can be a part of another one's key
class CacheEntry:
    """The place of one node's result. It is None until the node has run without a failure."""

    result: NodeResult | None = None


class OutputCache:
    """The entries of the last workflow that was selected.

    An entry's key is the content of a node: its class, its widget values, what IS_CHANGED returned, and for each link
    the entry of the node that it comes from, which stands for the content of all ancestors.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, CacheEntry] = {}

    def select(self, nodes: Sequence[Node], folders: Mapping[str, Path]) -> dict[str, CacheEntry]:
        """The entry of each node, by node id. Entries that none of these nodes has are dropped.

        The nodes must be in running order. Nodes of equal content share an entry. `folders` has the output folder of
        each node, by node id: what saves or shows a result has an entry for each folder, since its files are there.
        """
        selected: dict[Hashable, CacheEntry] = {}
        by_node: dict[str, CacheEntry] = {}
        for node in nodes:
            key = folders[node.id] if node.is_output else None, _content(node, by_node)
            entry = selected.get(key) or self._entries.get(key) or CacheEntry()
            selected[key] = by_node[node.id] = entry
        self._entries = selected
        return by_node


def _content(node: Node, entries: Mapping[str, CacheEntry]) -> Hashable:
    inputs = tuple(
        (name, entries[value[0]], value[1]) if is_link(value) else (name, _hashable(value))
        for name, value in node.declared_inputs()
    )
    # As in ComfyUI, a node that asks for its id, or that declares itself NOT_IDEMPOTENT, has an entry of its own.
    shares = "UNIQUE_ID" not in node.hidden.values() and not getattr(node.node_class, "NOT_IDEMPOTENT", False)
    return node.node_class, None if shares else node.id, _hashable(is_changed(node)), inputs


def is_changed(node: Node) -> Any:
    """What the node's IS_CHANGED returns, None without one. As in ComfyUI, linked inputs are None to it."""
    function = getattr(node.node_class, "IS_CHANGED", None)
    if function is None:
        return None
    try:
        return map_inputs(node, function, constant_inputs(node))
    except Exception as error:
        log.warning("%s: IS_CHANGED failed (%s); the node runs again", node.described, error)
        return math.nan


def _hashable(value: Any) -> Hashable:
    """A key for a JSON value or for what IS_CHANGED returned.

    It tells 1, 1.0 and True apart. NaN, and whatever cannot be compared, is equal to nothing: the node runs again.
    """
    if isinstance(value, Mapping):
        return dict, frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_hashable, value))
    if value is None or isinstance(value, (str, bytes, int)) or (isinstance(value, float) and not math.isnan(value)):
        return type(value), value
    return object()
