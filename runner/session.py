"""Runs API-format workflows without a ComfyUI server, through the same node classes that ComfyUI would call.

    with Session(output_dir="output") as session:
        results = session.run(read_workflow("workflows/api/describe.json"))
        results["7"].outputs[0]  # the list of values that output 0 of node 7 produced

A `Session` keeps what a ComfyUI server keeps between two prompts: node instances, and the outputs of the last workflow
with the loaded models among them. Its next run computes only what changed. `run_workflow` is a session of one run.

These rules are the same as in ComfyUI:

- Only the nodes that an output node needs are run, each once, under torch.inference_mode.
- Every input is a list. A node is called once for each item, and a shorter list repeats its last item; INPUT_IS_LIST
  nodes take whole lists, and OUTPUT_IS_LIST outputs are joined into one list.
- Outputs are cached by content: nodes of the same class, widget values, IS_CHANGED and ancestors are computed once.
  A node that fails or is interrupted is not cached.

Nodes are V1 classes (INPUT_TYPES, RETURN_TYPES, FUNCTION). Lazy inputs are always computed, and a node that expands
into other nodes is refused. workflow.py checks workflows, terminal.py shows a run in a terminal.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..nodes import host
from ..nodes.filenames import absolute, folder_problem, nearest_existing
from .execution import ExecutionError, NodeResult, execute
from .output_cache import OutputCache
from .workflow import Node, NodeClasses, Workflow, WorkflowError, plan


@dataclass(frozen=True)
class NodeStarted:
    """Event: node `number` of `count` starts."""

    node: Node
    number: int
    count: int


@dataclass(frozen=True)
class NodeProgress:
    """Event after each token: the running node has done `value` of at most `total` steps and written `text` so far."""

    node: Node
    value: int
    total: int
    text: str | None


@dataclass(frozen=True)
class NodeFinished:
    """Event: the node that started last is done. `cached` results were computed before, maybe in an earlier run."""

    node: Node
    result: NodeResult
    cached: bool


Event = NodeStarted | NodeProgress | NodeFinished
OnEvent = Callable[[Event], None]


def known_node_classes() -> dict[str, type]:
    """The node classes that a workflow can use here: this pack's, and our versions of a few of ComfyUI's."""
    from ..nodes import NODE_CLASS_MAPPINGS
    from . import core_nodes

    return {**core_nodes.NODE_CLASS_MAPPINGS, **NODE_CLASS_MAPPINGS}


def run_workflow(
    workflow: Workflow,
    node_classes: NodeClasses | None = None,
    *,
    output_dir: str | Path | None = None,
    input_dir: str | Path | None = None,
    on_event: OnEvent | None = None,
    extra_pnginfo: dict[str, Any] | None = None,
) -> dict[str, NodeResult]:
    """Runs `workflow` in a session of its own. The arguments are those of `Session` and `Session.run`."""
    with Session(node_classes, output_dir=output_dir, input_dir=input_dir) as session:
        return session.run(workflow, on_event=on_event, extra_pnginfo=extra_pnginfo)


class Session:
    """Runs workflows one after another and keeps the last one's outputs, loaded models included.

    A model stays loaded for as long as the output of its loader node is cached: until a workflow without that node
    runs, or until `close`, which a `with` block calls at its end.
    """

    def __init__(
        self,
        node_classes: NodeClasses | None = None,
        *,
        output_dir: str | Path | None = None,
        input_dir: str | Path | None = None,
    ):
        """
        Args:
            node_classes: the class of each node type; None means `known_node_classes()`.
            output_dir, input_dir: where nodes save to and load from; None means the folders of `host`.
        """
        self.node_classes = known_node_classes() if node_classes is None else node_classes
        self.output_dir = absolute(output_dir or host.output_directory())
        self.input_dir = absolute(input_dir or host.input_directory())
        self._cache = OutputCache()
        self._instances: dict[tuple[str, Any], Any] = {}  # by node id and class, as in ComfyUI

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops node instances, cached outputs and, with them, loaded models. A later run starts from nothing."""
        self._cache = OutputCache()
        self._instances = {}

    def run(
        self,
        workflow: Workflow,
        *,
        output_dir: str | Path | None = None,
        on_event: OnEvent | None = None,
        extra_pnginfo: dict[str, Any] | None = None,
    ) -> dict[str, NodeResult]:
        """Checks `workflow`, then runs it; returns the result of every node that an output node needs, by node id.

        Args:
            workflow: in the API format, as `read_workflow` returns it; it is not changed.
            output_dir: where nodes save to in this run; None means the session's folder. In another folder than before,
                the nodes that save or show a result run again, and nothing else does.
            on_event: called when a node starts, after each of its tokens and when it is done; may raise to stop.
            extra_pnginfo: passed to nodes that ask for EXTRA_PNGINFO, which save it in their images.

        Raises:
            WorkflowError: something is wrong with the workflow or the output folder. Nothing was run.
            ExecutionError: a node failed.
        """
        workflow = copy.deepcopy(workflow)
        notify = on_event or _ignore
        folder = self.output_dir if output_dir is None else absolute(output_dir)
        with host.folders(output=folder, input=self.input_dir), torch.inference_mode():
            nodes = plan(workflow, self.node_classes)
            check_writable(folder)
            entries = self._cache.select(nodes, dict.fromkeys((node.id for node in nodes), folder))
            self._keep_instances(nodes)
            results: dict[str, NodeResult] = {}
            for number, node in enumerate(nodes, start=1):
                notify(NodeStarted(node, number, len(nodes)))
                entry = entries[node.id]
                cached = entry.result is not None
                if entry.result is None:
                    entry.result = self._run_node(node, results, workflow, extra_pnginfo, notify)
                results[node.id] = entry.result
                notify(NodeFinished(node, entry.result, cached))
        return results

    def _keep_instances(self, nodes: Sequence[Node]) -> None:
        """Drops the instances of nodes that this workflow does not have."""
        keys = {(node.id, node.node_class) for node in nodes}
        self._instances = {key: instance for key, instance in self._instances.items() if key in keys}

    def _instance(self, node: Node) -> Any:
        key = node.id, node.node_class
        if key not in self._instances:
            self._instances[key] = node.node_class()
        return self._instances[key]

    def _run_node(
        self,
        node: Node,
        results: dict[str, NodeResult],
        workflow: Workflow,
        extra_pnginfo: dict[str, Any] | None,
        notify: OnEvent,
    ) -> NodeResult:
        raised_by_listener: list[Exception] = []

        def on_progress(value: int, total: int, text: str | None = None) -> None:
            try:
                notify(NodeProgress(node, value, total, text))
            except Exception as error:
                raised_by_listener.append(error)
                raise

        try:
            with host.listen(on_progress):
                return execute(node, self._instance(node), results, workflow, extra_pnginfo)
        except Exception as error:
            if raised_by_listener:  # the node did not fail
                raise raised_by_listener[0]  # noqa: B904 - it may be this very error
            raise ExecutionError(node, error) from error


def _ignore(event: Event) -> None:
    pass


def check_writable(folder: Path) -> None:
    """Raises WorkflowError for an output folder that cannot be made or written to. The folder is not made."""
    if problem := folder_problem(folder):
        raise WorkflowError(f"cannot make the output folder {folder}: {problem}")
    existing = nearest_existing(folder)
    if existing is None:
        raise WorkflowError(f"cannot make the output folder {folder}: {folder.anchor} does not exist; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise WorkflowError(f"cannot write to the output folder {folder}: no permission to write in {existing}")
