"""Write the templates from their descriptions in templates.py: the graphs of the page and of the queue, and the list.

    python workflows/build.py

A template is rows of groups of columns of nodes. Everything else follows: sizes and places, so that wires run from left
to right and never behind a node; sockets and values, which are those that the node classes declare; and the routes of
wires that pass over other columns, which travel in lanes above their row, by reroutes.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent

if __name__ == "__main__":  # relative imports need the package
    sys.path.insert(0, str(FOLDER.parent))
    import quickstart

    quickstart.load_pack()
    importlib.import_module(f"{quickstart.PACKAGE}.workflows.build").main()
    sys.exit()

from ..nodes import NODE_CLASS_MAPPINGS  # noqa: E402 (a script makes the package first)
from ..runner import core_nodes  # noqa: E402
from . import chinese  # noqa: E402
from .parts import NAMES, Column, Node, Out, Space, Template  # noqa: E402
from .templates import TEMPLATES  # noqa: E402

TYPES = {**core_nodes.NODE_CLASS_MAPPINGS, **NODE_CLASS_MAPPINGS}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN"}
IMAGE_NODES, TEXT_NODES = {"SaveImage", "PreviewImage", "MingConversationStoryboard"}, {"PreviewAny"}

# Pixels of the page at 100 %.
TITLE, SOCKET, EDGE = 30, 20, 14
WIDGET, MODERN_WIDGET, MODERN_FOOTER = 24, 28, 30  # the latter two in Nodes 2.0; a footer has the pack's name
TEXT = 60  # a text box of several lines
BETWEEN_COLUMNS, BETWEEN_NODES, BETWEEN_ROWS = 76, 56, 16
GROUP_EDGE, GROUP_TITLE = 14, 34
LANE = 15  # from lane to lane
BESIDE_OUTPUT = 14  # from node to wire, and from wire to wire, where they go up or down to their lanes
BEFORE_INPUT = 46  # from where a wire leaves its lane to the node that it goes to
ABOVE_ROW = TITLE + GROUP_EDGE + GROUP_TITLE + 14  # from the top of a row to its lowest lane
WINDOW, SCALE = (1440, 900), 0.6  # of the view that is saved
NOTE_ID = 1000
NOTE_TITLE = "About this template"
NOTE_COLORS = {"color": "#1d2733", "bgcolor": "#2a3847"}
OPTIONAL, LIST = 7, 6  # shapes of sockets


class Place(NamedTuple):
    """Where a node is: its row, its column in it, and its rectangle without the title bar."""

    row: int
    column: int
    x: int
    y: int
    width: int
    height: int


# --- What the node classes declare ------------------------------------------------------------------------------------


class Socket(NamedTuple):
    name: str
    type: str
    options: Mapping[str, Any]
    optional: bool

    @property
    def is_widget(self) -> bool:
        return self.type == "COMBO" or self.type in WIDGET_TYPES


def sockets(node_type: str) -> list[Socket]:
    """The inputs of a node type, in order."""
    declared = TYPES[node_type].INPUT_TYPES()
    found = []
    for part in ("required", "optional"):
        for name, (kind, *options) in declared.get(part, {}).items():
            combo = not isinstance(kind, str)
            more = {"options": kind} if combo else {}
            found.append(
                Socket(
                    name, "COMBO" if combo else kind, {**more, **(options[0] if options else {})}, part == "optional"
                )
            )
    return found


def outputs(node_type: str) -> list[tuple[str, str, bool]]:
    """Name, type and whether it is a list, of each output of a node type."""
    declared = TYPES[node_type]
    types = declared.RETURN_TYPES
    lists = getattr(declared, "OUTPUT_IS_LIST", (False,) * len(types))
    return list(zip(getattr(declared, "RETURN_NAMES", types), types, lists, strict=True))


def value_of(node: Node, socket: Socket) -> Any:
    """The value of a widget: given, or its default. A linked one keeps its default."""
    given = node.inputs.get(socket.name)
    if given is not None and not isinstance(given, Out):
        return given
    if "default" in socket.options:
        return socket.options["default"]
    return socket.options["options"][0] if socket.type == "COMBO" else ""


def link_of(template: Template, out: Out) -> tuple[int, str]:
    """The index and the type of an output. Raises ValueError if the node has none of that name."""
    (source,) = (node for node in template.nodes if node.id == out.node)
    for index, (name, kind, _) in enumerate(outputs(source.type)):
        if name == out.name:
            return index, kind
    raise ValueError(f"{template.name}: node {out.node} has no output {out.name!r}")


# --- The graph for the queue ------------------------------------------------------------------------------------------


def api_graph(template: Template) -> dict[str, Any]:
    graph = {}
    for node in template.nodes:
        unknown = set(node.inputs) - {socket.name for socket in sockets(node.type)}
        if unknown:
            raise ValueError(f"{template.name}: node {node.id} has no input {', '.join(sorted(unknown))}")
        inputs: dict[str, Any] = {}
        for socket in sockets(node.type):
            given = node.inputs.get(socket.name)
            if isinstance(given, Out):
                inputs[socket.name] = [str(given.node), link_of(template, given)[0]]
            elif socket.is_widget:
                inputs[socket.name] = value_of(node, socket)
            elif not socket.optional:
                raise ValueError(f"{template.name}: {socket.name} of node {node.id} is not linked")
        graph[str(node.id)] = {"class_type": node.type, "inputs": inputs, "_meta": {"title": node.title}}
    return graph


# --- Sizes and places -------------------------------------------------------------------------------------------------


def height(node: Node) -> int:
    """The height that a node needs in the classic rendering and in Nodes 2.0, which hides advanced widgets."""
    declared = sockets(node.type)
    rows = max(sum(not s.is_widget for s in declared), len(outputs(node.type)), 1)
    fixed = EDGE + SOCKET * rows + (node.area if node.type in IMAGE_NODES | TEXT_NODES else 0)
    classic = modern = fixed
    for socket in (s for s in declared if s.is_widget):
        if socket.options.get("multiline"):
            classic += node.area or TEXT
            modern += node.area or TEXT
        else:
            classic += WIDGET * (2 if socket.options.get("control_after_generate") else 1)
            modern += 0 if socket.options.get("advanced") else MODERN_WIDGET
    if node.type == "MingUnderstand":  # which shows its answer
        classic, modern = classic + TEXT, modern + TEXT
    if node.type in NODE_CLASS_MAPPINGS:
        modern += MODERN_FOOTER * (2 if any(s.options.get("advanced") for s in declared) else 1)
    return max(classic, modern)


def lanes_of(template: Template) -> dict[int, list[Out]]:
    """For each row, the outputs whose wires travel in the lanes above it: the lowest lane first."""
    seats = {n.id: (r, c) for r, c, column in numbered_columns(template) for n in column.nodes if isinstance(n, Node)}
    lanes: dict[int, list[Out]] = {row: [] for row in range(len(template.rows))}
    for node in template.nodes:
        row, column = seats[node.id]
        for out in node.inputs.values():
            if isinstance(out, Out) and not is_next(seats[out.node], (row, column)) and out not in lanes[row]:
                lanes[row].append(out)
    for outs in lanes.values():  # outputs of one node nest: the lower the output, the lower its lane
        order = [out.node for out in outs]
        outs.sort(key=lambda out: (-order.index(out.node), -link_of(template, out)[0]))
    return lanes


def is_next(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether a wire needs no lane: it goes from a column to the next one of the same row."""
    return source[0] == target[0] and source[1] + 1 == target[1]


def numbered_columns(template: Template) -> Iterator[tuple[int, int, Column]]:
    for number, row in enumerate(template.rows):
        for place, column in enumerate(column for group in row for column in group.columns):
            yield number, place, column


def places(template: Template) -> tuple[dict[int, Place], dict[int, int]]:
    """Where every node is (the note too), and the y of the top of each row."""
    lanes = lanes_of(template)
    found: dict[int, Place] = {}
    tops: dict[int, int] = {}
    top, row, x = 0, -1, 0
    for number, place, column in numbered_columns(template):
        if number != row:
            if row >= 0:
                bottom = max(p.y + p.height for p in found.values())
                top = bottom + GROUP_EDGE + BETWEEN_ROWS + ABOVE_ROW + LANE * max(0, len(lanes[number]) - 1)
            row, x = number, 0
            tops[row] = top
        y = top
        for node in column.nodes:
            if isinstance(node, Space):
                y += node.height
                continue
            size = (column.width, height(node)) if isinstance(node, Node) else (node.width, node.height)
            found[node.id if isinstance(node, Node) else NOTE_ID] = Place(row, place, x, y, *size)
            y += size[1] + BETWEEN_NODES
        x += column.width + BETWEEN_COLUMNS
    return found, tops


def group_frames(template: Template, found: Mapping[int, Place]) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = []
    for group in (group for row in template.rows for group in row):
        if not group.title:
            continue
        rectangles = [found[n.id] for column in group.columns for n in column.nodes if isinstance(n, Node)]
        left, top = min(p.x for p in rectangles) - GROUP_EDGE, min(p.y for p in rectangles)
        top -= TITLE + GROUP_EDGE + GROUP_TITLE
        right = max(p.x + p.width for p in rectangles) + GROUP_EDGE
        bottom = max(p.y + p.height for p in rectangles) + GROUP_EDGE
        frames.append(
            {
                "id": len(frames) + 1,
                "title": group.title,
                "bounding": [left, top, right - left, bottom - top],
                "color": group.color,
                "flags": {},
            }
        )
    return frames


# --- Wires ------------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    id: int
    out: Out
    output: int  # its number
    target: int
    slot: int  # of the input, as the page numbers them
    type: str


def page_inputs(node: Node) -> list[Socket]:
    """The inputs that the page saves: sockets, then widgets that are linked."""
    declared = sockets(node.type)
    linked = [s for s in declared if s.is_widget and isinstance(node.inputs.get(s.name), Out)]
    return [*(s for s in declared if not s.is_widget), *linked]


def links_of(template: Template) -> list[Link]:
    links: list[Link] = []
    for node in template.nodes:
        for slot, socket in enumerate(page_inputs(node)):
            out = node.inputs.get(socket.name)
            if isinstance(out, Out):
                index, kind = link_of(template, out)
                links.append(Link(len(links) + 1, out, index, node.id, slot, kind))
    return links


def add_reroute(reroutes: list[dict[str, Any]], x: int, y: int, links: list[int], parent: int | None) -> int:
    """Add a reroute that these links pass, coming from the reroute `parent`; returns its id."""
    before = {"parentId": parent} if parent else {}
    reroutes.append({"id": len(reroutes) + 1, **before, "pos": [x, y], "linkIds": links})
    return len(reroutes)


def reroutes_of(template: Template, links: list[Link], found: Mapping[int, Place], tops: Mapping[int, int]) -> tuple:
    """The reroutes of all wires that travel in lanes, and by which reroute each of those wires arrives.

    A wire rises to its lane beside the column that it comes from, and leaves it beside the one that it goes to. Wires
    from the same output share their lane, as a tree.
    """
    lanes = lanes_of(template)
    reroutes: list[dict[str, Any]] = []
    arrivals = []
    for row, outs in lanes.items():
        for number, out in enumerate(outs):
            source = found[out.node]
            taken = [
                link
                for link in links
                if link.out == out and found[link.target].row == row and not is_next(source[:2], found[link.target][:2])
            ]
            y = tops[row] - ABOVE_ROW - LANE * number
            beside = [o for o in outs[number:] if found[o.node][:2] == source[:2]]
            start = source.x + source.width + BESIDE_OUTPUT * len(beside)
            trunk = add_reroute(reroutes, start, y, [link.id for link in taken], None)
            leaving = sorted(taken, key=lambda link: found[link.target].x)
            left = [link for link in leaving if found[link.target].x <= start]
            right = [link for link in leaving if found[link.target].x > start]
            for passing in (left[::-1], right):
                parent, at = trunk, start
                for k, link in enumerate(passing):
                    x = found[link.target].x - BEFORE_INPUT
                    if x != at:
                        parent, at = add_reroute(reroutes, x, y, [p.id for p in passing[k:]], parent), x
                    arrivals.append({"id": link.id, "parentId": parent})
    return reroutes, sorted(arrivals, key=lambda a: a["id"])


# --- The graph for the page -------------------------------------------------------------------------------------------


def page_graph(template: Template) -> dict[str, Any]:
    found, tops = places(template)
    links = links_of(template)
    reroutes, arrivals = reroutes_of(template, links, found, tops)
    nodes = [page_node(template, node, found[node.id], links, order) for order, node in enumerate(template.nodes)]
    nodes.append(note_node(template, found[NOTE_ID], len(nodes)))
    extra: dict[str, Any] = {"ds": view(found)}
    if reroutes:
        extra |= {"reroutes": reroutes, "linkExtensions": arrivals}
    return {
        "id": "00000000-0000-0000-0000-000000000000",
        "revision": 0,
        "last_node_id": max(node["id"] for node in nodes if node["id"] != NOTE_ID),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": [[link.id, link.out.node, link.output, link.target, link.slot, link.type] for link in links],
        "groups": group_frames(template, found),
        "config": {},
        "extra": extra,
        "version": 0.4,
    }


def view(found: Mapping[int, Place]) -> dict[str, Any]:
    """The template in the middle of a window, for versions that open it where it was saved; others fit it in."""
    middle = [(min(p[i] for p in found.values()) + max(p[i] + p[i + 2] for p in found.values())) / 2 for i in (2, 3)]
    return {"scale": SCALE, "offset": [round(side / SCALE / 2 - m) for side, m in zip(WINDOW, middle, strict=True)]}


def page_node(template: Template, node: Node, place: Place, links: list[Link], order: int) -> dict[str, Any]:
    arriving = {link.slot: link.id for link in links if link.target == node.id}
    inputs: list[dict[str, Any]] = []
    for slot, socket in enumerate(page_inputs(node)):
        shape = {"shape": OPTIONAL} if socket.optional else {}
        widget = {"widget": {"name": socket.name}} if socket.is_widget else {}
        inputs.append({"name": socket.name, **shape, "type": socket.type, **widget, "link": arriving.get(slot)})
    outs = []
    for name, kind, is_list in outputs(node.type):
        leaving = [link.id for link in links if link.out == Out(node.id, name)]
        outs.append({"name": name, **({"shape": LIST} if is_list else {}), "type": kind, "links": leaving or None})
    named: dict[str, Any] = {}
    for socket in sockets(node.type):
        if socket.is_widget:
            named[socket.name] = value_of(node, socket)
            if socket.options.get("control_after_generate"):
                named["control_after_generate"] = "fixed"
    return {
        "id": node.id,
        "type": node.type,
        "pos": [place.x, place.y],
        "size": [place.width, place.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": inputs,
        "outputs": outs,
        **({"title": node.title} if node.label else {}),  # without one, the page shows its name in the page's language
        "properties": {"Node name for S&R": node.type},
        "widgets_values": list(named.values()),
        "widgets_values_named": named,
    }


def note_node(template: Template, place: Place, order: int) -> dict[str, Any]:
    return {
        "id": NOTE_ID,
        "type": "MarkdownNote",
        "pos": [place.x, place.y],
        "size": [place.width, place.height],
        "flags": {},
        "order": order,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": NOTE_TITLE,
        "properties": {},
        "widgets_values": [note_text(template.note)],
        **NOTE_COLORS,
    }


def note_text(sentences: tuple[str, str]) -> str:
    """Two headings: text of the usual size is too small where a template is shown whole."""
    return "\n\n".join(f"# {sentence}" for sentence in sentences)


# --- The files --------------------------------------------------------------------------------------------------------


def written(graph: dict[str, Any], indent: int) -> str:
    return json.dumps(graph, indent=indent, ensure_ascii=False) + "\n"


def listing(templates: list[Template]) -> str:
    """workflows/README.md: what each template does, in both languages."""
    lines = [
        "# Templates",
        "",
        "Made by `python workflows/build.py` from the descriptions in `templates.py`; `api/` has the same graphs for",
        "the queue. 由 `python workflows/build.py` 生成；`api/` 中是供队列使用的同一批图。",
        "",
        "| | Template | What it does |",
        "|---|---|---|",
    ]
    for t in templates:
        picture = f'<img src="{t.name}.jpg" width="128" alt="">'
        lines.append(
            f"| {picture} | **{t.title[0]}**<br>{t.title[1]}<br>`{t.name}` | {t.sentence[0]}<br>{t.sentence[1]} |"
        )
    return "\n".join(lines) + "\n"


def chinese_words(templates: list[Template]) -> dict[str, dict[str, str]]:
    """What the page needs to show templates in Chinese: each text of theirs and what takes its place."""
    notes = {note_text(t.note): note_text(chinese.NOTES[t.name]) for t in templates}
    names = {node.type: NAMES[node.type] for t in templates for node in t.nodes}
    return {
        "names": dict(sorted(names.items())),
        "groups": chinese.GROUPS,
        "labels": chinese.LABELS,
        "notes": {NOTE_TITLE: chinese.NOTE_TITLE, **notes},
    }


def files(templates: list[Template]) -> dict[str, str]:
    """The text of every file, by its path from this folder."""
    made = {
        "README.md": listing(templates),
        "../web/template_words.json": written(chinese_words(templates), 1),
    }
    for template in templates:
        made[f"{template.name}.json"] = written(page_graph(template), 1)
        made[f"api/{template.name}.json"] = written(api_graph(template), 2)
    return made


def main() -> None:
    for name, text in files(TEMPLATES).items():
        (FOLDER / name).write_text(text, encoding="utf-8")
