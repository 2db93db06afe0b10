"""Reads, changes and checks workflow files in ComfyUI's API format, before any node runs.

The API format is what ComfyUI's "Export (API)" writes and what its queue accepts: a JSON object that maps a node id to
``{"class_type": ..., "inputs": {...}, "_meta": {"title": ...}}``, where an input is either a widget value or a link
``[node id, output index]``.

- `read_workflow` reads such a file, `with_settings` and `with_image` return a changed copy of it.
- `plan` checks a workflow against node classes and returns the nodes to run, in order. It follows the rules of ComfyUI
  0.33, with two differences. ComfyUI's queue drops an output whose branch is broken and runs the others; here every
  problem is collected into one `WorkflowError` and nothing runs. Widget values are converted as in ComfyUI unless that
  would lose information: 2.5 for an INT, "no" for a BOOLEAN or NaN for a FLOAT is refused.

Nothing here runs a node.
"""

from __future__ import annotations

import copy
import difflib
import graphlib
import heapq
import inspect
import math
import os.path
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ming_core.json_files import FileError, printable, read_json
from ..nodes.filenames import absolute

EXAMPLE_SCENE = "MingExampleScene"
LOAD_IMAGE = "LoadImage"

_ANY = "*"
_COMBO = "COMBO"
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", _COMBO}
_MAX_CHOICES_SHOWN = 20  # in an error message, of choices, nodes and problems alike
_MAX_NAME_SHOWN = 80  # characters of a title, an id or a type; names are at the mercy of whoever wrote the file

_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 100

NodeClasses = Mapping[str, Any]  # V1 node classes, which share no base class, by node type
Workflow = dict[str, dict[str, Any]]


class Problem(str):
    """One sentence about what is wrong. `place` is the (node id, input) that it is about, None for the whole."""

    place: tuple[str, str] | None

    def __new__(cls, sentence: str, place: tuple[str, str] | None = None) -> Problem:
        problem = super().__new__(cls, printable(sentence))
        problem.place = place if place is not None else getattr(sentence, "place", None)
        return problem


class WorkflowError(ValueError):
    """A workflow was refused before any of it ran. `problems` has one sentence for each problem."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [Problem(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in this workflow:\n  - "
        shown, more = self.problems[:_MAX_CHOICES_SHOWN], len(self.problems) - _MAX_CHOICES_SHOWN
        super().__init__(head + "\n  - ".join([*shown, f"and {more} more"] if more > 0 else shown))


@dataclass(frozen=True)
class Socket:
    """A declared input of a node class: a widget, or a socket that only accepts a link."""

    name: str
    kind: str  # "INT", "IMAGE", "COMBO", "*", or a union such as "INT,FLOAT"
    choices: tuple[Any, ...]  # of a COMBO
    options: Mapping[str, Any]
    required: bool


@dataclass(frozen=True)
class Node:
    """A node of a workflow with its class. `inputs` has widget values and links [node id, output index]."""

    id: str
    class_type: str
    title: str
    node_class: Any
    inputs: dict[str, Any]
    sockets: Mapping[str, Socket]
    hidden: Mapping[str, str]  # name -> "UNIQUE_ID", "PROMPT", ...

    def __str__(self) -> str:
        return f"{_short(self.title)} ({_short(self.id)})"

    @property
    def described(self) -> str:
        """The id, title and class of the node, for error messages."""
        return _described(self.id, self.title, self.class_type)

    @property
    def is_output(self) -> bool:
        return _is_output(self.node_class)

    @property
    def function(self) -> str:
        """The name of the method that runs the node."""
        return self.node_class.FUNCTION

    @property
    def input_is_list(self) -> bool:
        return bool(getattr(self.node_class, "INPUT_IS_LIST", False))

    @property
    def output_is_list(self) -> tuple[bool, ...]:
        """Whether each output is a list; empty means that none is."""
        return tuple(getattr(self.node_class, "OUTPUT_IS_LIST", None) or ())

    def declared_inputs(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, value or link) of every input that is set and that the class declares, in declared order."""
        for name in self.sockets:
            if name in self.inputs:
                yield name, self.inputs[name]

    def links(self) -> Iterator[tuple[str, str, int]]:
        """Yields (input name, node id, output index) of every linked input."""
        for name, value in self.inputs.items():
            if is_link(value):
                yield name, value[0], value[1]

    def hidden_values(self, workflow: Workflow | None, extra_pnginfo: Any = None) -> dict[str, Any]:
        """The values of the hidden inputs. What only a ComfyUI server knows is None."""
        values = {"UNIQUE_ID": self.id, "PROMPT": workflow, "EXTRA_PNGINFO": extra_pnginfo}
        return {name: values.get(kind) for name, kind in self.hidden.items()}


def _is_output(node_class: Any) -> bool:
    return getattr(node_class, "OUTPUT_NODE", False) is True


def is_link(value: Any) -> bool:
    """Whether the value of an input is a link [node id, output index]. 0.0 is an index, as in ComfyUI; 0.5 is not."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], (str, int))
        and isinstance(value[1], (int, float))
        and not isinstance(value[1], bool)
        and float(value[1]).is_integer()
    )


def _short(text: str) -> str:
    """A name for a message, cut where nobody would read on."""
    return text if len(text) <= _MAX_NAME_SHOWN else f"{text[:_MAX_NAME_SHOWN]}..."


def _described(node_id: str, title: str, class_type: str) -> str:
    return f'node {_short(node_id)} "{_short(title)}" ({_short(class_type)})'


def _listed(names: Iterable[str]) -> str:
    """Names for a message, as many as one looks through."""
    names = list(names)
    more = len(names) - _MAX_CHOICES_SHOWN
    return ", ".join(map(_short, names[:_MAX_CHOICES_SHOWN])) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Reading and changing


def read_workflow(path: str | Path) -> Workflow:
    """Reads an API-format workflow file, or the body of a queue request, ``{"prompt": workflow}``.

    Raises WorkflowError if the file is missing, too long, not valid JSON, nested too deep, or in the format that
    ComfyUI's "Save" writes.
    """
    path = Path(path)
    try:
        data = read_json(path, remedy='export it again with Workflow > "Export (API)"')
    except FileError as error:
        raise WorkflowError(str(error)) from None
    if isinstance(data, dict) and isinstance(data.get("prompt"), dict) and "class_type" not in data["prompt"]:
        data = data["prompt"]
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        twin = path.parent / "api" / path.name
        remedy = f"use {twin}" if twin.is_file() else 'export it with Workflow > "Export (API)"'
        raise WorkflowError(
            f"{path} is in the format of ComfyUI's editor, and only the API format can be run here; {remedy}"
        )
    if not isinstance(data, dict) or not data:
        raise WorkflowError(f"{path} is not a workflow: expected a JSON object that maps node ids to nodes")
    return data


def with_settings(workflow: Workflow, settings: Iterable[str], node_classes: NodeClasses) -> Workflow:
    """Returns a copy of `workflow` with inputs replaced. Each setting is NODE.INPUT=VALUE, where NODE is a node id.

    VALUE is read as JSON if it is valid JSON (["5", 0] is a link to output 0 of node 5), otherwise as a string. For a
    text widget, anything but a JSON string or a link is used as it was typed. Raises WorkflowError for an unknown node
    or input.
    """
    _check_shape(workflow)
    workflow = copy.deepcopy(workflow)
    problems = []
    for setting in settings:
        target, equals, text = setting.partition("=")
        node_id, dot, name = target.rpartition(".")
        if not (equals and dot and node_id and name):
            problems.append(f'setting "{_short(setting)}": expected NODE.INPUT=VALUE, for example 5.seed=7')
            continue
        try:
            kind = _kind_of_input(workflow, node_id, name, node_classes)
        except ValueError as error:
            problems.append(f'setting "{_short(setting)}": {error}')
            continue
        value = _parsed(text)
        as_typed = kind == "STRING" and not (isinstance(value, str) or is_link(value))
        workflow[node_id].setdefault("inputs", {})[name] = text if as_typed else value
    if problems:
        raise WorkflowError(problems)
    return workflow


def with_inputs(workflow: Workflow, values: Mapping[tuple[str, str], Any], node_classes: NodeClasses) -> Workflow:
    """Returns a copy of `workflow` with the values of inputs replaced, by (node id, input).

    Text is taken literally by a text widget, and elsewhere read as JSON if it is valid JSON: "7" is 7 for a number.
    Raises WorkflowError for an unknown node or input, with its place.
    """
    _check_shape(workflow)
    workflow = copy.deepcopy(workflow)
    problems = []
    for place, value in values.items():
        node_id, name = place
        try:
            kind = _kind_of_input(workflow, node_id, name, node_classes)
        except ValueError as error:
            problems.append(Problem(str(error), place))
            continue
        literal = kind == "STRING" or not isinstance(value, str)
        workflow[node_id].setdefault("inputs", {})[name] = value if literal else _parsed(value)
    if problems:
        raise WorkflowError(problems)
    return workflow


def with_image(workflow: Workflow, file: str | Path) -> Workflow:
    """Returns a copy of `workflow` that starts from the image in `file`, which may be anywhere.

    Every MingExampleScene that is linked to another node becomes a LoadImage of that file, and inputs that took the
    scene's caption get an empty text. In a workflow without such a scene, the file of every LoadImage is replaced.
    """
    path = str(absolute(file))
    if not os.path.isfile(path):
        raise WorkflowError(f"there is no picture file {path}")
    _check_shape(workflow)
    workflow = copy.deepcopy(workflow)
    links = [
        (node["inputs"], name, str(value[0]), value[1])
        for node in workflow.values()
        for name, value in node.get("inputs", {}).items()
        if is_link(value)
    ]
    scenes = {source for *_, source, _ in links if workflow.get(source, {}).get("class_type") == EXAMPLE_SCENE}
    loaders = {node_id for node_id, node in workflow.items() if node["class_type"] == LOAD_IMAGE}
    if not (scenes or loaders):
        raise WorkflowError(
            f"this workflow does not start from a picture: it has neither {EXAMPLE_SCENE} nor {LOAD_IMAGE}"
        )
    for node_id in scenes or loaders:
        workflow[node_id].update(class_type=LOAD_IMAGE, inputs={"image": path}, _meta={"title": "Load Image"})
    for inputs, name, source, index in links:
        if source in scenes and index != 0:
            inputs[name] = ""
    return workflow


def _kind_of_input(workflow: Workflow, node_id: str, name: str, node_classes: NodeClasses) -> str | None:
    """The declared type of an input; None for one that only the workflow knows. Raises ValueError without one."""
    if node_id not in workflow:
        known = _listed(f"{known_id} ({_short(_title(node))})" for known_id, node in workflow.items())
        raise ValueError(f"there is no node {_short(node_id)}; the workflow has {known}")
    node = workflow[node_id]
    node_class = node_classes.get(node["class_type"])
    sockets = _sockets(node_class.INPUT_TYPES()) if node_class else {}
    inputs = node.get("inputs", {})
    if name not in sockets and name not in inputs:
        known = _listed(dict.fromkeys([*sockets, *inputs])) or "no inputs"
        raise ValueError(
            f'node {_short(node_id)} "{_short(_title(node))}" has no input "{_short(name)}"; it has {known}'
        )
    return sockets[name].kind if name in sockets else None


def _parsed(text: str) -> Any:
    """The value of JSON text, and any other text as it is."""
    try:
        return read_json(text.encode("utf-8", "surrogatepass"))
    except FileError:
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def plan(workflow: Workflow, node_classes: NodeClasses) -> list[Node]:
    """Checks `workflow` and returns the nodes that the output nodes need, in running order, output nodes early.

    The nodes' inputs are copies, with values converted to the types of their widgets. Raises WorkflowError with every
    problem: unknown node types, missing inputs, links to nothing or to the wrong type, cycles, values that a widget
    does not accept, and what a node's own VALIDATE_INPUTS refuses.
    """
    _check_shape(workflow)
    problems = _unknown_types(workflow, node_classes)
    known = {node_id: entry for node_id, entry in workflow.items() if entry["class_type"] in node_classes}
    outputs = [node_id for node_id, entry in known.items() if _is_output(node_classes[entry["class_type"]])]
    if not problems and not outputs:
        problems.append("there is nothing to run: no node saves or shows a result; add SaveImage or PreviewAny")
    needed = _nodes(_needed(known, outputs), node_classes)
    for node in needed.values():
        problems += _checked(node, needed, known=workflow)
    order, cycle = _running_order(needed)
    problems += cycle
    if problems:
        raise WorkflowError(problems)
    return order


def _check_shape(workflow: Workflow) -> None:
    if not isinstance(workflow, dict) or not workflow:
        raise WorkflowError("the workflow is empty: expected an object that maps node ids to nodes")
    problems = []
    for node_id, entry in workflow.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_type"), str):
            problems.append(f'node {_short(node_id)}: has no "class_type"; is this workflow in the API format?')
        elif not isinstance(entry.get("inputs", {}), dict):
            problems.append(
                f'node {_short(node_id)} ({_short(entry["class_type"])}): "inputs" is not an object of names and values'
            )
    if problems:
        raise WorkflowError(problems)


def _unknown_types(workflow: Workflow, node_classes: NodeClasses) -> list[str]:
    problems: list[str] = []
    for node_id, entry in workflow.items():
        class_type = entry["class_type"]
        if class_type not in node_classes:
            where = f'node {_short(node_id)} "{_short(_title(entry))}"'
            hint = f"; {_hint(class_type, node_classes)}" if len(problems) < _MAX_CHOICES_SHOWN else ""  # costs time
            problems.append(f"{where}: unknown node type {_short(class_type)}{hint}")
    return problems


def _needed(workflow: Workflow, outputs: Iterable[str]) -> Workflow:
    """The output nodes and all their ancestors, in the order of the file."""
    found: set[str] = set()
    pending = list(outputs)
    while pending:
        node_id = pending.pop()
        if node_id in workflow and node_id not in found:
            found.add(node_id)
            values = workflow[node_id].get("inputs", {}).values()
            pending += [str(value[0]) for value in values if is_link(value)]
    return {node_id: entry for node_id, entry in workflow.items() if node_id in found}


def _nodes(workflow: Workflow, node_classes: NodeClasses) -> dict[str, Node]:
    # A class is asked once however many nodes it has: some look through the model folders to answer.
    used = dict.fromkeys(entry["class_type"] for entry in workflow.values())
    declared = {name: node_classes[name].INPUT_TYPES() for name in used}
    sockets = {name: _sockets(types) for name, types in declared.items()}
    return {
        node_id: Node(
            id=node_id,
            class_type=(class_type := entry["class_type"]),
            title=_title(entry),
            node_class=node_classes[class_type],
            inputs={name: _normal(value) for name, value in entry.get("inputs", {}).items()},
            sockets=sockets[class_type],
            hidden={name: _kind(spec) for name, spec in declared[class_type].get("hidden", {}).items()},
        )
        for node_id, entry in workflow.items()
    }


def _hint(class_type: str, node_classes: NodeClasses) -> str:
    """What to do about an unknown node type."""
    near = difflib.get_close_matches(_short(class_type), node_classes, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}?"
    if class_type.startswith("Ming"):
        return "this version of the Ming-UniVision pack does not have it; update the pack, the workflow may be newer"
    others = ", ".join(sorted(name for name in node_classes if not name.startswith("Ming")))
    return (
        "it belongs to ComfyUI or to another node pack; run this workflow in ComfyUI, "
        f"because only this pack's nodes and {others} run without it"
    )


def _normal(value: Any) -> Any:
    """Returns a link as [text, integer], and a value without the {"__value__": ...} that tells lists from links."""
    if is_link(value):
        return [str(value[0]), int(value[1])]
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
        return tuple(value) if is_link(value) else value  # a list that is meant as a value is never a link
    return copy.deepcopy(value)


def _title(entry: Mapping[str, Any]) -> str:
    meta = entry.get("_meta")
    title = meta.get("title") if isinstance(meta, dict) else None
    return str(title or entry["class_type"])


def _kind(spec: Any) -> Any:
    """The type of a declared input, which may be followed by its options."""
    return spec[0] if isinstance(spec, (tuple, list)) else spec


def _sockets(declared: Mapping[str, Any]) -> dict[str, Socket]:
    sockets = {}
    for category in ("required", "optional"):
        for name, spec in declared.get(category, {}).items():
            kind, options = _kind(spec), (spec[1] if len(spec) > 1 else {})
            choices: Sequence[Any] = ()
            if isinstance(kind, (list, tuple)):
                kind, choices = _COMBO, kind
            elif kind == _COMBO:
                choices = options.get("options", ())
            sockets[name] = Socket(name, kind, tuple(choices), options, category == "required")
    return sockets


def _running_order(nodes: Mapping[str, Node]) -> tuple[list[Node], list[str]]:
    graph = {node.id: {source for _, source, _ in node.links() if source in nodes} for node in nodes.values()}
    sorter = graphlib.TopologicalSorter(graph)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = [str(nodes[node_id]) for node_id in error.args[1]]
        if len(cycle) > _MAX_CHOICES_SHOWN:
            cycle = [*cycle[: _MAX_CHOICES_SHOWN - 1], f"{len(cycle) - _MAX_CHOICES_SHOWN} more", cycle[-1]]
        path = " -> ".join(cycle)
        return [], [f"these nodes depend on each other in a cycle: {path}"]
    # Output nodes run as soon as they can, so that an answer can be read while the next image is being drawn.
    rank = {node.id: (not node.is_output, number, node.id) for number, node in enumerate(nodes.values())}
    order: list[Node] = []
    ready: list[tuple[bool, int, str]] = []
    while sorter.is_active():
        for node_id in sorter.get_ready():
            heapq.heappush(ready, rank[node_id])
        order.append(nodes[heapq.heappop(ready)[-1]])
        sorter.done(order[-1].id)
    return order, []


def _checked(node: Node, nodes: Mapping[str, Node], known: Mapping[str, Any]) -> list[str]:
    """The problems of one node's inputs. Converts the values in `node.inputs` to the types of their widgets."""
    validate = getattr(node.node_class, "VALIDATE_INPUTS", None)
    asked = inspect.getfullargspec(validate) if validate else None
    own_types = asked is not None and "input_types" in asked.args
    problems: list[str] = [
        Problem(f'{node.described}: the required input "{socket.name}" is missing', (node.id, socket.name))
        for socket in node.sockets.values()
        if socket.required and socket.name not in node.inputs
    ]
    received: dict[str, Any] = {}
    for name, value in node.inputs.items():
        where = f'{node.described}, input "{_short(name)}"'
        socket = node.sockets.get(name)
        try:
            if is_link(value):
                received[name] = _linked_type(value, nodes, known)
                _check_link(socket, None if own_types else received[name], value, nodes)
            elif socket is not None:
                # As in ComfyUI, a node that validates an input itself also checks its bounds.
                by_node = asked is not None and (asked.varkw is not None or name in asked.args)
                node.inputs[name] = _widget_value(socket, value, check_bounds=not by_node)
        except ValueError as error:
            problems.append(Problem(f"{where}: {error}", (node.id, name)))
    if asked is not None and not problems:
        problems += _refused_by_node(node, validate, asked, received)
    return problems


def _linked_type(link: list[Any], nodes: Mapping[str, Node], known: Mapping[str, Any]) -> str | None:
    """The type of the output that a link comes from; None if the type of its node is unknown."""
    source, index = link
    if source not in nodes:
        if source in known:
            return None
        raise ValueError(f"it is linked to node {_short(source)}, which is not in the workflow")
    types = nodes[source].node_class.RETURN_TYPES
    if not 0 <= index < len(types):
        has = f"only outputs 0 to {len(types) - 1}" if types else "no outputs"
        raise ValueError(f"it is linked to output {index} of {nodes[source].described}, which has {has}")
    return types[index]


def _check_link(socket: Socket | None, received: Any, link: list[Any], nodes: Mapping[str, Node]) -> None:
    if socket is None:
        raise ValueError(f"it is linked to node {_short(link[0])}, but there is no such input")
    if received is not None and not _fits(received, socket.kind):
        raise ValueError(f"expected {socket.kind}, but output {link[1]} of {nodes[link[0]].described} is {received}")


def _fits(received: Any, expected: str) -> bool:
    """ComfyUI's rule: the types are equal, one is "*", or two comma-separated unions have a type in common."""
    received = _COMBO if isinstance(received, (list, tuple)) else received
    have, want = ({part.strip() for part in kind.split(",")} for kind in (received, expected))
    return _ANY in have | want or bool(have & want)


def _widget_value(socket: Socket, value: Any, check_bounds: bool) -> Any:
    """Converts `value` to the type of its widget, or raises a ValueError that says what the widget accepts."""
    if isinstance(value, list):
        raise ValueError(f"{_shown(value)} is not a value; a link is [node id, output index]")
    kinds = {part.strip() for part in socket.kind.split(",")}
    if _ANY in kinds:
        return value
    if not kinds & _WIDGETS:
        raise ValueError(f"expected a link to an output of type {socket.kind}, not the value {_shown(value)}")
    if len(kinds) > 1:
        return value
    convert: dict[str, Callable[[Any], Any]] = {
        "INT": _as_int,
        "FLOAT": _as_float,
        "STRING": _as_text,
        "BOOLEAN": _as_bool,
    }
    value = convert.get(socket.kind, _as_choice)(value)
    if check_bounds:
        _check_bounds(socket, value)
    return value


def _check_bounds(socket: Socket, value: Any) -> None:
    if socket.kind == _COMBO and value not in socket.choices:
        near = difflib.get_close_matches(_short(str(value)), map(str, socket.choices), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(repr(choice) for choice in socket.choices[:_MAX_CHOICES_SHOWN]) or "(no choices)"
        more = len(socket.choices) - _MAX_CHOICES_SHOWN
        raise ValueError(f"{_shown(value)} is not one of: {shown}{f' and {more} more' if more > 0 else ''}{hint}")
    if socket.kind not in ("INT", "FLOAT"):
        return
    low, high = socket.options.get("min"), socket.options.get("max")
    below, above = low is not None and value < low, high is not None and value > high
    if below or above:
        allowed = f"{low} to {high}" if None not in (low, high) else f"{low} or more" if below else f"{high} or less"
        raise ValueError(
            f"{_shown(value)} is {'below the minimum' if below else 'above the maximum'}; it must be {allowed}"
        )


def _as_int(value: Any) -> int:
    try:
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError(f"{_shown(value)} is not a whole number (INT)")


def _as_float(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{_shown(value)} is not a finite number (FLOAT)")
    return number


def _as_text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{_shown(value)} is not text (STRING)")


def _as_bool(value: Any) -> bool:
    if value in (True, False):  # 0 and 1 as well
        return bool(value)
    raise ValueError(f"{_shown(value)} is neither true nor false (BOOLEAN)")


def _as_choice(value: Any) -> Any:
    if value is None or isinstance(value, dict):
        raise ValueError(f"{_shown(value)} is not a choice (COMBO)")
    return value


def _shown(value: Any) -> str:
    """A value for a message, cut where nobody would read on."""
    return _values.repr(value)


def _refused_by_node(node: Node, validate: Any, asked: inspect.FullArgSpec, received: dict[str, Any]) -> list[str]:
    """Calls VALIDATE_INPUTS as ComfyUI does: by name, with only the arguments that it declares, None for links."""
    values = {name: None if is_link(value) else value for name, value in node.inputs.items() if name in node.sockets}
    values.update(node.hidden_values(None))
    if asked.varkw is None:
        values = {name: value for name, value in values.items() if name in (*asked.args, *asked.kwonlyargs)}
    if "input_types" in asked.args:
        values["input_types"] = received
    try:
        verdict = validate(**values)
    except Exception as error:
        verdict = f"{type(error).__name__}: {error}"
    if verdict is True:
        return []
    names = [name for name in values if name in node.inputs]
    quoted = ", ".join(f'"{name}"' for name in names)
    where = f"{node.described}, input {quoted}" if names else node.described
    place = (node.id, names[0]) if len(names) == 1 else None
    return [Problem(f"{where}: {verdict if verdict else 'the node refuses it'}", place)]
