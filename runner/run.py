"""Runs an API-format workflow without a ComfyUI server, through the very node classes that ComfyUI would call.

    results = run_workflow(read_workflow("workflows/api/describe.json"), output_dir="output")
    results["7"].outputs[0]    # all that output 0 of node 7 gave, a list

What ComfyUI does and this does too: only what the output nodes need is run, each node once, under
torch.inference_mode; every input is a list, the node is called once for each item, a shorter list repeats its last
item; INPUT_IS_LIST nodes take whole lists, and OUTPUT_IS_LIST outputs are joined into one list. Nodes are V1 classes
(INPUT_TYPES, RETURN_TYPES, FUNCTION); lazy inputs are simply computed, and a node that expands into others is refused.
Checking a workflow is `headless_workflow`'s part, the terminal is `headless_cli`'s, and progress and folders come
through `host`, as they do for the nodes.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..nodes import host
from ..nodes.filenames import nearest_existing
from .workflow import Node, NodeClasses, Workflow, WorkflowError, plan


@dataclass(frozen=True)
class NodeResult:
    """What a node gave: for each output socket the list of its values, what it shows to the user, and its seconds."""

    outputs: tuple[list[Any], ...]
    ui: dict[str, list[Any]]
    seconds: float


@dataclass(frozen=True)
class NodeStarted:
    """Event: node `number` of `count` begins."""

    node: Node
    number: int
    count: int


@dataclass(frozen=True)
class Progress:
    """Event, once a token: the running node did `value` of at most `total` steps; `text` is what it wrote so far."""

    node: Node
    value: int
    total: int
    text: str | None


@dataclass(frozen=True)
class NodeFinished:
    """Event: the node that began last is done."""

    node: Node
    result: NodeResult


Event = NodeStarted | Progress | NodeFinished


class NodeError(RuntimeError):
    """A node raised while it ran; `node` is the node, `__cause__` what it raised. Files saved before it stay."""

    def __init__(self, node: Node, cause: Exception):
        super().__init__(f"{node.described} failed: {str(cause) or type(cause).__name__}")
        self.node = node


def known_node_classes() -> dict[str, type]:
    """The node classes that a workflow can use here: this pack's, and our own versions of a few of ComfyUI's."""
    from ..nodes import NODE_CLASS_MAPPINGS
    from . import core_nodes

    return {**core_nodes.NODE_CLASS_MAPPINGS, **NODE_CLASS_MAPPINGS}


def run_workflow(
    workflow: Workflow,
    node_classes: NodeClasses | None = None,
    *,
    output_dir: str | Path | None = None,
    input_dir: str | Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    extra_pnginfo: dict[str, Any] | None = None,
) -> dict[str, NodeResult]:
    """Checks `workflow`, then runs it; returns the result of every node that ran, by node id.

    Args:
        workflow: API format, as `read_workflow` gives it; not changed.
        node_classes: class of each node type; None means `known_node_classes()`.
        output_dir, input_dir: where nodes save to and load from; None means the host's own folders.
        on_event: is told when a node starts, after each of its tokens and when it is done; may raise to stop.
        extra_pnginfo: given to nodes that ask for EXTRA_PNGINFO, which save it in their pictures.

    Raises:
        WorkflowError: something is wrong with the workflow or the output folder; nothing was run.
        NodeError: a node failed.
    """
    classes = known_node_classes() if node_classes is None else node_classes
    output = Path(output_dir or host.output_directory()).expanduser().resolve()
    inputs = Path(input_dir or host.input_directory()).expanduser().resolve()
    tell = on_event or (lambda event: None)
    workflow = copy.deepcopy(workflow)
    with host.folders(output=output, input=inputs), torch.inference_mode():
        nodes = plan(workflow, classes)
        _check_writable(output)
        results: dict[str, NodeResult] = {}
        for number, node in enumerate(nodes, start=1):
            tell(NodeStarted(node, number, len(nodes)))
            results[node.id] = _run_node(node, results, workflow, extra_pnginfo, tell)
            tell(NodeFinished(node, results[node.id]))
    return results


def _check_writable(folder: Path) -> None:
    """Refuses an output folder that cannot be made or written to, without making it."""
    existing = nearest_existing(folder)
    if existing is None:
        raise WorkflowError(f"the output folder {folder} cannot be made: there is no {folder.anchor}; choose another")
    if not existing.is_dir():
        raise WorkflowError(f"the output folder {folder} cannot be made: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise WorkflowError(f"the output folder {folder} cannot be written to: no right to write in {existing}")


def _run_node(
    node: Node,
    results: dict[str, NodeResult],
    workflow: Workflow,
    extra_pnginfo: dict[str, Any] | None,
    tell: Callable[[Event], None],
) -> NodeResult:
    stopped: list[Exception] = []

    def on_progress(value: int, total: int, text: str | None = None) -> None:
        try:
            tell(Progress(node, value, total, text))
        except Exception as error:
            stopped.append(error)
            raise

    started = time.perf_counter()
    try:
        inputs = _gathered_inputs(node, results)
        inputs |= {name: [value] for name, value in node.hidden_values(workflow, extra_pnginfo).items()}
        with host.listen(on_progress):
            returned = _mapped(node, inputs)
        outputs, ui = _merged(node, returned)
    except Exception as error:
        if stopped:  # it was not the node that failed
            raise stopped[0]  # noqa: B904 - it may be this very error
        raise NodeError(node, error) from error
    return NodeResult(outputs, ui, time.perf_counter() - started)


def _gathered_inputs(node: Node, results: dict[str, NodeResult]) -> dict[str, list[Any]]:
    """Every declared input as a list: what the linked output gave, or the one value of a widget."""
    inputs = {name: [value] for name, value in node.inputs.items() if name in node.sockets}
    for name, source, index in node.links():
        outputs = results[source].outputs
        if index >= len(outputs):
            raise ValueError(f'input "{name}": node {source} gave no output {index}')
        inputs[name] = outputs[index]
    return inputs


def _mapped(node: Node, inputs: dict[str, list[Any]]) -> list[Any]:
    """What the node returned, one item a call."""
    function = getattr(node.node_class(), node.node_class.FUNCTION)
    if getattr(node.node_class, "INPUT_IS_LIST", False):
        return [function(**inputs)]
    for name, values in inputs.items():
        if not values:
            raise ValueError(f'input "{name}" is linked to an output that gave an empty list')
    calls = max((len(values) for values in inputs.values()), default=1)
    return [
        function(**{name: values[min(i, len(values) - 1)] for name, values in inputs.items()}) for i in range(calls)
    ]


def _merged(node: Node, returned: list[Any]) -> tuple[tuple[list[Any], ...], dict[str, list[Any]]]:
    """Joins the calls' results socket by socket, and what they show key by key."""
    rows, ui = [], {}
    for value in returned:
        if isinstance(value, dict):
            if "expand" in value:
                raise NotImplementedError("the node expands into other nodes, which only ComfyUI can run")
            for key, items in value.get("ui", {}).items():
                ui.setdefault(key, []).extend(items)
            value = value.get("result")
        rows.append(() if value is None else tuple(value))
    count = len(rows[0])
    is_list = getattr(node.node_class, "OUTPUT_IS_LIST", None) or (False,) * count
    outputs = tuple(
        [item for row in rows for item in row[socket]] if is_list[socket] else [row[socket] for row in rows]
        for socket in range(count)
    )
    return outputs, ui
