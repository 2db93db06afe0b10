"""The code as tests read it: parsed files, and the texts in them."""

from __future__ import annotations

import ast
from pathlib import Path


def nodes_of(file: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def text_of(node: ast.AST) -> str | None:
    """The text of a string or an f-string, with {} for what is filled in; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
