"""Python sources and what their syntax trees say: the ground that `laws.py` stands on."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """One text file: its path from the project's root with forward slashes, and what is in it."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree; only for Python files."""
        return ast.parse(self.text, filename=self.path)

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    @property
    def num_statements(self) -> int:
        """Statements, without docstrings and other constants that stand alone."""
        return sum(
            isinstance(node, ast.stmt)
            and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            for node in ast.walk(self.tree)
        )

    @property
    def module(self) -> str:
        """The dotted name of a module below src/."""
        parts = self.path.removeprefix("src/").removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def at(self, where: ast.AST | int, message: str) -> str:
        """`message` behind the file and the line that it is about."""
        line = where if isinstance(where, int) else getattr(where, "lineno", 1)
        return f"{self.path}:{line}: {message}"


def read_sources(root: Path, *folders: str) -> list[Source]:
    """All Python files under `folders`, in the order of their paths."""
    files = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return [Source(f.relative_to(root).as_posix(), f.read_text(encoding="utf-8")) for f in files]


def dotted(node: ast.AST) -> str:
    """The dotted name that an expression is, "" when it is not a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def last_name(node: ast.AST) -> str:
    """The last part of a name or an attribute: "c" for `a.b.c`, and for `f().c` too."""
    return node.attr if isinstance(node, ast.Attribute) else dotted(node)


def functions(source: Source) -> list[FunctionNode]:
    """Every function of a file: methods and functions inside functions too."""
    return [node for node in ast.walk(source.tree) if isinstance(node, FunctionNode)]


def methods(node: ast.AST) -> list[FunctionNode]:
    """The methods of a class; nothing for any other node."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    return [child for child in body if isinstance(child, FunctionNode)]


def public(node: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    """Public definitions of a module and of its public classes, not those inside functions."""
    for child in node.body:
        if not isinstance(child, Definition):
            continue
        if child.name != "__call__" and child.name.startswith("_"):
            continue
        if not {last_name(mark) for mark in child.decorator_list} & {"overload", "setter"}:
            yield child
        if isinstance(child, ast.ClassDef):
            yield from public(child)


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import of a file, wherever it stands, with the absolute dotted name of its target."""
    package = source.module.split(".")
    if not source.path.endswith("__init__.py"):
        package.pop()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__"):
            target = node.args[0] if node.args else None
            if isinstance(target, ast.Constant):
                yield node, str(target.value)


def assignments(body: list[ast.stmt]) -> Iterator[tuple[ast.stmt, list[ast.expr], ast.expr]]:
    """Statement, targets and value of the assignments of a module, inside `if` and `try` too."""
    for node in body:
        if isinstance(node, ast.Assign):
            yield node, node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield node, [node.target], node.value
        for name in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, Definition):
                yield from assignments(getattr(node, name, []))


def eager_calls(value: ast.AST) -> Iterator[ast.Call]:
    """The calls that evaluating an expression makes, those inside a lambda left out."""
    if isinstance(value, ast.Lambda):
        return
    if isinstance(value, ast.Call):
        yield value
    for child in ast.iter_child_nodes(value):
        yield from eager_calls(child)
