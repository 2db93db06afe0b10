"""Rows in one pass: their workflows run side by side, and what they draw at the same point is drawn together.

Each row runs until a node has to draw. When all rows have come to such a node, or to their end, those that differ only
in prompts, pictures, conversations or seeds are drawn in one pass over the weights (`Engine.generate_batch`). Each is
the same as alone, within rounding. Nodes of equal content are computed once, as in one workflow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...ming_core import DrawRequest, Engine, Guidance, ImageOptions, Solver
from ...nodes import host
from ...nodes.inputs import check_inputs
from ..execution import ExecutionError, NodeResult, gathered_inputs
from ..output_cache import CacheEntry
from ..session import NodeProgress, Session, check_writable
from ..workflow import Node, NodeClasses, Workflow, WorkflowError, is_link, plan

PROMPTS = {"MingGenerate": "prompt", "MingEdit": "instruction"}  # the nodes that draw, and their prompts

Outcome = Mapping[str, NodeResult] | ExecutionError | WorkflowError


@dataclass
class Lane:
    """A row on its way: the nodes that are left in running order, the results so far, and what stopped it."""

    number: int
    workflow: Workflow
    folder: Path
    nodes: deque[Node] = field(default_factory=deque)
    results: dict[str, NodeResult] = field(default_factory=dict)
    error: ExecutionError | WorkflowError | None = None

    def outcome(self) -> Outcome:
        return self.error or {_own_id(node_id): result for node_id, result in self.results.items()}


class Drawing(NamedTuple):
    """What a node is about to draw. Drawings of one `kind` can be drawn in one pass."""

    kind: tuple[Any, ...]
    engine: Engine
    request: DrawRequest
    options: ImageOptions


class BatchSession(Session):
    """A session that also runs several workflows side by side, and draws up to `batch` pictures in one pass."""

    def __init__(self, batch: int, node_classes: NodeClasses | None = None, *, input_dir: str | Path | None = None):
        super().__init__(node_classes, input_dir=input_dir)
        self.batch = batch

    def run_together(self, workflows: Sequence[Workflow], folders: Sequence[Path]) -> list[Outcome]:
        """Runs workflows, each with an output folder of its own; one that fails does not stop the others."""
        lanes = [Lane(number, *pair) for number, pair in enumerate(zip(workflows, folders, strict=True))]
        with torch.inference_mode(), host.folders(output=self.output_dir, input=self.input_dir):
            for lane in lanes:
                self._plan(lane)
            nodes = [node for lane in lanes for node in lane.nodes]
            entries = self._cache.select(nodes, {node.id: lane.folder for lane in lanes for node in lane.nodes})
            self._keep_instances(nodes)
            while any(lane.nodes for lane in lanes):
                waiting = [(lane, drawing) for lane in lanes if (drawing := self._advance(lane, entries)) is not None]
                self._draw(waiting, entries)
        return [lane.outcome() for lane in lanes]

    def _plan(self, lane: Lane) -> None:
        try:
            with host.folders(output=lane.folder, input=self.input_dir):
                check_writable(lane.folder)
                lane.nodes.extend(_renamed(node, lane.number) for node in plan(lane.workflow, self.node_classes))
        except WorkflowError as error:
            lane.error = error

    def _advance(self, lane: Lane, entries: Mapping[str, CacheEntry]) -> Drawing | None:
        """Runs a row until its next node has something to draw, which is returned; None at its end."""
        while lane.nodes:
            node = lane.nodes[0]
            if entries[node.id].result is None and (drawing := _drawing(node, lane)) is not None:
                return drawing
            self._run_alone(lane, entries)
        return None

    def _run_alone(self, lane: Lane, entries: Mapping[str, CacheEntry]) -> None:
        """Runs the next node of a row, or takes its result from the cache."""
        node = lane.nodes.popleft()
        entry = entries[node.id]
        try:
            if entry.result is None:
                with host.folders(output=lane.folder, input=self.input_dir):
                    entry.result = self._run_node(node, lane.results, lane.workflow, None, _ignore)
            lane.results[node.id] = entry.result
        except ExecutionError as error:
            assert isinstance(error.__cause__, Exception)
            lane.error = ExecutionError(replace(node, id=_own_id(node.id)), error.__cause__)
            lane.nodes.clear()

    def _draw(self, waiting: Sequence[tuple[Lane, Drawing]], entries: Mapping[str, CacheEntry]) -> None:
        """Draws what is waiting, as much in one pass as can be, and moves each row on by one node."""
        groups: dict[tuple[Any, ...], dict[int, tuple[CacheEntry, Drawing]]] = {}
        for lane, drawing in waiting:
            entry = entries[lane.nodes[0].id]
            groups.setdefault(drawing.kind, {})[id(entry)] = entry, drawing  # of equal content, one is drawn
        for group in groups.values():
            alike = list(group.values())
            for start in range(0, len(alike), self.batch):
                _draw_in_one_pass(alike[start : start + self.batch])
        for lane, _ in waiting:
            self._run_alone(lane, entries)


def _draw_in_one_pass(drawings: Sequence[tuple[CacheEntry, Drawing]]) -> None:
    """Fills the entries. A single one is left to its node, and so are all if the pass fails: then each says why."""
    if len(drawings) < 2:
        return
    started = time.perf_counter()
    first = drawings[0][1]
    try:
        results = first.engine.generate_batch([drawing.request for _, drawing in drawings], first.options)
    except Exception:
        return
    seconds = (time.perf_counter() - started) / len(results)
    for (entry, _), result in zip(drawings, results, strict=True):
        entry.result = NodeResult(([result.features], [result.conversation], [result.text]), {}, seconds)


def _drawing(node: Node, lane: Lane) -> Drawing | None:
    """What a node is about to draw; None if it draws nothing, or has to run by itself."""
    if node.class_type not in PROMPTS:
        return None
    gathered = gathered_inputs(node, lane.results)
    if any(len(items) != 1 for items in gathered.values()):
        return None
    try:
        values = check_inputs(node.node_class, {name: items[0] for name, items in gathered.items()})
        return _request(node.class_type, values)
    except (ValueError, TypeError):
        return None  # its node says it in words


def _request(class_type: str, values: dict[str, Any]) -> Drawing | None:
    model, prompt, seed = (values.pop(name) for name in ("model", PROMPTS[class_type], "seed"))
    features, conversation = values.pop("features", None), values.pop("conversation", None)
    nothing_to_edit = class_type == "MingEdit" and features is None and not (conversation and conversation.images)
    if values["batch_size"] != 1 or values["start"] != "draw now" or nothing_to_edit:
        return None
    mask = values.pop("mask", None)
    options = ImageOptions(
        guidance=Guidance(values["text_guidance"], values["image_guidance"]),
        solver=Solver(values["steps"], values["solver"]),
        temperature=values["temperature"],
        max_new_tokens=values["max_new_tokens"],
        mask=mask,
    )
    past = {} if conversation is None else {"conversation": conversation}
    request = DrawRequest(prompt, seed, features=features, **past)
    kind = class_type, id(model.model), id(mask), tuple(sorted(values.items()))
    return Drawing(kind, host.load_to_gpu(model), request, options)


def _own_id(node_id: str) -> str:
    """The id that a renamed node has in its workflow."""
    return node_id.partition("/")[2]


def _renamed(node: Node, lane: int) -> Node:
    """The node under an id that no other row has."""
    inputs = {
        name: [f"{lane}/{value[0]}", value[1]] if is_link(value) else value for name, value in node.inputs.items()
    }
    return replace(node, id=f"{lane}/{node.id}", inputs=inputs)


def _ignore(event: NodeProgress | Any) -> None:
    pass
