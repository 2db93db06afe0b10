"""Runs one node: gathers its inputs as lists, calls it once for each item, joins what the calls return."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .workflow import Node, Workflow, is_link


@dataclass(frozen=True)
class NodeResult:
    """What a node returned: a list of values for each output socket, what it shows to the user, and its run time."""

    outputs: tuple[list[Any], ...]
    ui: dict[str, list[Any]]
    seconds: float


class ExecutionError(RuntimeError):
    """A node raised an exception while it ran: `node` is the node, `__cause__` the exception. Saved files stay."""

    def __init__(self, node: Node, cause: Exception):
        super().__init__(f"{node.described} failed: {str(cause) or type(cause).__name__}")
        self.node = node


def execute(
    node: Node,
    instance: Any,
    results: Mapping[str, NodeResult],
    workflow: Workflow,
    extra_pnginfo: dict[str, Any] | None = None,
) -> NodeResult:
    """Runs `node` on the results of the nodes that it is linked to, by node id."""
    started = time.perf_counter()
    inputs = gathered_inputs(node, results)
    inputs |= {name: [value] for name, value in node.hidden_values(workflow, extra_pnginfo).items()}
    returned = map_inputs(node, getattr(instance, node.function), inputs)
    outputs, ui = _merge(node, returned)
    return NodeResult(outputs, ui, time.perf_counter() - started)


def constant_inputs(node: Node) -> dict[str, list[Any]]:
    """The inputs that are known before anything runs, as lists; a linked input is None."""
    inputs = {name: [None if is_link(value) else value] for name, value in node.declared_inputs()}
    return inputs | {name: [value] for name, value in node.hidden_values(None).items()}


def map_inputs(node: Node, function: Callable[..., Any], inputs: Mapping[str, list[Any]]) -> list[Any]:
    """Calls `function` once for each item of the longest list, and returns what each call returned.

    A shorter list repeats its last item. An INPUT_IS_LIST node is called once, with whole lists.
    """
    if node.input_is_list:
        return [function(**inputs)]
    for name, values in inputs.items():
        if not values:
            raise ValueError(f'the input "{name}" is linked to an output that returned an empty list')
    calls = max((len(values) for values in inputs.values()), default=1)
    return [
        function(**{name: values[min(i, len(values) - 1)] for name, values in inputs.items()}) for i in range(calls)
    ]


def gathered_inputs(node: Node, results: Mapping[str, NodeResult]) -> dict[str, list[Any]]:
    """Every declared input as a list of its own: the values of the linked output, or the one value of a widget."""
    inputs = {name: [value] for name, value in node.declared_inputs() if not is_link(value)}
    for name, source, index in node.links():
        outputs = results[source].outputs
        if index >= len(outputs):
            raise ValueError(f'the input "{name}" is linked to output {index} of node {source}, which returned none')
        inputs[name] = list(outputs[index])
    return inputs


def _merge(node: Node, returned: list[Any]) -> tuple[tuple[list[Any], ...], dict[str, list[Any]]]:
    """Joins the results of all calls: outputs socket by socket, what the node shows key by key."""
    rows: list[tuple[Any, ...]] = []
    ui: dict[str, list[Any]] = {}
    for value in returned:
        if isinstance(value, dict):
            if "expand" in value:
                raise NotImplementedError("the node expands into other nodes, which only ComfyUI can run")
            for key, items in value.get("ui", {}).items():
                ui.setdefault(key, []).extend(items)
            value = value.get("result")
        rows.append(() if value is None else tuple(value))
    count = len(rows[0])
    is_list = node.output_is_list or (False,) * count
    outputs = tuple(
        [item for row in rows for item in row[socket]] if is_list[socket] else [row[socket] for row in rows]
        for socket in range(count)
    )
    return outputs, ui
