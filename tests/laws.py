"""The laws of this code base, one function per law, over source text and syntax trees.

Every law takes the sources of the tree and returns its violations, one readable line each with
file and line; an empty list means that the law holds. `test_laws.py` applies each law to the real
tree and shows on small broken sources that it fires.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from types import MappingProxyType

from syntax import (
    Definition,
    Source,
    assignments,
    dotted,
    eager_calls,
    functions,
    imports,
    last_name,
    methods,
    public,
)

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_CORE_STATEMENTS = 3000  # in model/ and engine/, without engine/multistep/: one long evening
MAX_FOLDER_FILES = 16
TOP = frozenset(("mor", "__main__", "cli"))  # these may import everything
_UP_TO_IO = ("errors", "validation", "machine", "yaml_config", "ops", "model", "io")
_UP_TO_TRAIN = (*_UP_TO_IO, "data", "engine", "train")
_UP_TO_TERMINAL = (*_UP_TO_TRAIN, "eval", "report", "terminal")
LAYERS = MappingProxyType(  # what each part of src/mor may import besides itself
    {
        "errors": (),
        "validation": ("errors",),
        "machine": (),
        "yaml_config": ("errors",),
        "ops": ("errors",),
        "model": ("errors", "validation", "ops"),
        "io": ("errors", "validation", "yaml_config", "ops", "model"),
        "data": _UP_TO_IO,
        "engine": _UP_TO_IO,
        "train": (*_UP_TO_IO, "data"),
        "eval": _UP_TO_TRAIN,
        "report": (*_UP_TO_TRAIN, "eval"),
        "terminal": (*_UP_TO_TRAIN, "eval", "report"),
        "experiments": _UP_TO_TERMINAL,
        "serve": (*_UP_TO_TRAIN, "eval"),
        "bench": (*_UP_TO_TRAIN, "eval", "serve"),
        "demo": (*_UP_TO_TERMINAL, "experiments", "bench"),
    }
)
MAY_PRINT = ("src/mor/cli/", "src/mor/terminal/", "src/mor/demo.py", "src/mor/bench/")
DOCUMENTED = tuple(f"src/mor/{part}/" for part in ("model", "engine", "ops", "io", "data", "train"))
WITHOUT_TORCH = frozenset(
    f"src/mor/engine/{name}.py" for name in ("request", "pages", "prefix", "plan", "scheduler")
)
ALLOWED_EFFECTS = frozenset(  # `import mor.io.hf` is how a user registers our models
    (("src/mor/io/hf/__init__.py", "register"),)
)
MUTABLE_CALLS = frozenset(  # what returns something that can be changed
    (
        *("list", "dict", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque"),
        *("sorted", "split", "splitlines"),
    )
)
PURE_CALLS = frozenset(  # functions in small letters that a constant may be computed with
    (
        *("tuple", "frozenset", "range", "int", "float", "str", "bytes", "len", "min", "max"),
        *("sum", "abs", "round", "object", "cast", "namedtuple", "partial", "re.compile"),
        *("collections.namedtuple", "functools.partial", "logging.getLogger", "math.log"),
        *("math.sqrt", "torch.device", "torch.finfo", "np.dtype", "np.finfo", "np.iinfo"),
        *("get_args", "typing.get_args"),
    )
)
PURE_METHODS = frozenset(("join", "encode", "strip", "with_name", "joinpath"))
DISPLAYS = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
HOSTS = ("pypi", "pythonhosted", "npmjs", "debian", "download.pytorch")
WORDS = (("chat", "gpt"), ("cla", "ude"), ("anth", "ropic"), ("co", "pilot"))
FORBIDDEN = re.compile(  # put together here, so that this file does not name what it forbids
    "|".join([re.escape(f"{host}.org") for host in HOSTS] + ["".join(word) for word in WORDS]),
    re.IGNORECASE,
)


def file_length(sources: Sequence[Source]) -> list[str]:
    """A file has at most 400 lines."""
    return [
        s.at(MAX_FILE_LINES + 1, f"{s.num_lines} lines, {MAX_FILE_LINES} are allowed")
        for s in sources
        if s.num_lines > MAX_FILE_LINES
    ]


def function_length(sources: Sequence[Source]) -> list[str]:
    """A function has at most 60 lines, its signature and docstring included."""
    found = []
    for source in sources:
        for node in functions(source):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                message = f"{node.name} has {length} lines, {MAX_FUNCTION_LINES} are allowed"
                found.append(source.at(node, message))
    return found


def core_length(sources: Sequence[Source]) -> list[str]:
    """model/ and engine/ without engine/multistep/ have at most `MAX_CORE_STATEMENTS` statements.

    Docstrings do not count, and a statement may take as many lines as it likes: to say more, or to
    lay it out well, costs nothing.
    """
    core = [
        source
        for source in sources
        if source.path.startswith(("src/mor/model/", "src/mor/engine/"))
        and not source.path.startswith("src/mor/engine/multistep/")
    ]
    total = sum(source.num_statements for source in core)
    if total <= MAX_CORE_STATEMENTS:
        return []
    message = f"model/ and engine/ have {total} statements, {MAX_CORE_STATEMENTS} are allowed"
    return [core[0].at(1, message)]


def folder_size(sources: Sequence[Source]) -> list[str]:
    """A folder of src/mor has at most 16 modules of its own."""
    folders: dict[str, list[Source]] = {}
    for source in _package(sources):
        folders.setdefault(source.path.rsplit("/", 1)[0], []).append(source)
    return [
        found[0].at(1, f"{folder} has {len(found)} modules, {MAX_FOLDER_FILES} are allowed")
        for folder, found in folders.items()
        if len(found) > MAX_FOLDER_FILES
    ]


def import_circles(sources: Sequence[Source]) -> list[str]:
    """No module imports, at any remove, a module that imports it."""
    package = {source.module: source for source in _package(sources)}
    graph = {
        name: {
            module
            for _, target in imports(source)
            for module in (target, target.rpartition(".")[0])
            if module in package and package[module].path[-11:] != "__init__.py"
        }
        for name, source in package.items()
    }
    found = []
    for start in graph:
        reached, waiting = set[str](), list(graph[start])
        while waiting:
            module = waiting.pop()
            if module not in reached:
                reached.add(module)
                waiting.extend(graph[module])
        if start in reached:
            found.append(package[start].at(1, f"{start} imports itself, by way of others"))
    return found


def layering(sources: Sequence[Source]) -> list[str]:
    """Imports point left only, and every part of src/mor has its place in `LAYERS`."""
    found = []
    for source in _package(sources):
        layer = _layer(source.module)
        if layer in TOP:
            continue
        if layer not in LAYERS:
            found.append(source.at(1, f"{layer} has no place among the layers in tests/laws.py"))
            continue
        allowed = (layer, *LAYERS[layer])
        for node, target in imports(source):
            if target.split(".")[0] == "mor" and _layer(target) not in allowed:
                found.append(source.at(node, f"{layer} must not import {target}"))
    return found


def printing(sources: Sequence[Source]) -> list[str]:
    """Only the command line, the demo and the benchmarks print."""
    return [
        source.at(node, "print outside cli/, terminal/, demo.py and bench/")
        for source in _package(sources)
        if not source.path.startswith(MAY_PRINT)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and last_name(node.func) == "print"
    ]


def import_effects(sources: Sequence[Source]) -> list[str]:
    """Importing a module defines names, and does nothing else."""
    return [
        source.at(node, f"{what} runs at import time")
        for source in _package(sources)
        for node, what in chain.from_iterable(map(_effects, source.tree.body))
        if (source.path, _called(node)) not in ALLOWED_EFFECTS
    ]


def mutable_globals(sources: Sequence[Source]) -> list[str]:
    """No module-level name is bound to something mutable, and nothing is declared `global`."""
    found = []
    for source in _package(sources):
        for node, targets, value in assignments(source.tree.body):
            name = ", ".join(map(dotted, targets))
            if name != "__all__" and _is_mutable(value):
                hint = "wrap it in MappingProxyType, tuple or frozenset"
                found.append(source.at(node, f"{name} is mutable: {hint}"))
        declared = (node for node in ast.walk(source.tree) if isinstance(node, ast.Global))
        found.extend(source.at(node, f"global {', '.join(node.names)}") for node in declared)
    return found


def config_changes(sources: Sequence[Source]) -> list[str]:
    """Configs are frozen dataclasses; `object.__setattr__` occurs in `__post_init__` only."""
    found = []
    for source in _package(sources):
        building = [f for f in functions(source) if f.name == "__post_init__"]
        allowed = {id(node) for function in building for node in ast.walk(function)}
        for node in ast.walk(source.tree):
            forced = isinstance(node, ast.Attribute) and dotted(node) == "object.__setattr__"
            if forced and id(node) not in allowed:
                found.append(source.at(node, "object.__setattr__ outside __post_init__"))
            elif source.path.endswith("/config.py") and _is_thawed_dataclass(node):
                found.append(source.at(node, "a config must be a frozen dataclass"))
    return found


def torch_free_bookkeeping(sources: Sequence[Source]) -> list[str]:
    """The engine's bookkeeping is plain Python: it does not import torch."""
    return [
        source.at(node, "the engine's bookkeeping must not import torch")
        for source in sources
        if source.path in WITHOUT_TORCH
        for node, target in imports(source)
        if target.split(".")[0] == "torch"
    ]


def forbidden_text(sources: Sequence[Source]) -> list[str]:
    """No file names a package registry's host or one of the forbidden words."""
    return [
        source.at(number, f"{match.group()!r} must not be named here")
        for source in sources
        for number, line in enumerate(source.text.splitlines(), start=1)
        for match in FORBIDDEN.finditer(line)
    ]


def annotations(sources: Sequence[Source]) -> list[str]:
    """Every parameter and every return of a function in src/mor is annotated.

    Compiled functions, marked `no_type_check`, take their types from their arguments.
    """
    found = []
    for source in _package(sources):
        bound = {
            id(method)
            for node in ast.walk(source.tree)
            for method in methods(node)
            if "staticmethod" not in map(dotted, method.decorator_list)
        }
        for node in functions(source):
            if any(dotted(mark) == "no_type_check" for mark in node.decorator_list):
                continue  # compiled: it takes its types from its arguments
            spec = node.args
            named = [*spec.posonlyargs, *spec.args][int(id(node) in bound) :]
            starred = [argument for argument in (spec.vararg, spec.kwarg) if argument is not None]
            untyped = [a for a in (*named, *spec.kwonlyargs, *starred) if a.annotation is None]
            found.extend(source.at(a, f"{node.name}: {a.arg} has no type") for a in untyped)
            if node.returns is None:
                found.append(source.at(node, f"{node.name} has no return type"))
    return found


def docstrings(sources: Sequence[Source]) -> list[str]:
    """Public functions, classes and methods of the core have a docstring.

    A property of one line and a method that overrides an inherited one may do without: their name,
    or the docstring of what they override, says it all.
    """
    return [
        source.at(node, f"{node.name} has no docstring")
        for source in sources
        if source.path.startswith(DOCUMENTED)
        for node in public(source.tree)
        if ast.get_docstring(node) is None and not _speaks_for_itself(source, node)
    ]


def checking_tests(sources: Sequence[Source]) -> list[str]:
    """Every test checks something."""
    return [
        source.at(node, f"{node.name} checks nothing")
        for source in sources
        if source.path.startswith("tests/") and source.path.split("/")[-1].startswith("test_")
        for node in functions(source)
        if node.name.startswith("test_") and not any(map(_is_check, ast.walk(node)))
    ]


def _package(sources: Sequence[Source]) -> list[Source]:
    return [source for source in sources if source.path.startswith("src/mor/")]


def _layer(module: str) -> str:
    """The part of src/mor that a module, or a name that is imported, belongs to."""
    return [*module.split("."), "mor"][1]


def _effects(node: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    """What a module-level statement does at import time beyond defining names."""
    if isinstance(node, Definition | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        outside = [t for t in targets if isinstance(t, ast.Attribute | ast.Subscript)]
        yield from ((target, "an assignment to something else's part") for target in outside)
        calls = eager_calls(node.value) if node.value is not None else ()
        yield from ((call, f"{dotted(call.func)}()") for call in calls if not _is_pure(call.func))
    elif isinstance(node, ast.If) and last_name(node.test) == "TYPE_CHECKING":
        yield from chain.from_iterable(map(_effects, [*node.body, *node.orelse]))
    elif isinstance(node, ast.Try) and _awaits_a_missing_package(node):
        inner = [s for handler in node.handlers for s in handler.body]
        inner = [s for s in inner if not isinstance(s, ast.Raise | ast.Pass)]
        yield from chain.from_iterable(map(_effects, [*node.body, *node.orelse, *inner]))
    elif not (isinstance(node, ast.If) and "__name__" in map(dotted, ast.walk(node.test))):
        yield node, f"a module-level `{type(node).__name__.lower()}`"


def _called(node: ast.AST) -> str:
    """The function that a bare call calls."""
    call = node.value if isinstance(node, ast.Expr) else None
    return dotted(call.func) if isinstance(call, ast.Call) else ""


def _is_pure(function: ast.expr) -> bool:
    """Whether a constant may be computed with it: a constructor, or a known pure function."""
    last = last_name(function)
    constructs = last.lstrip("_")[:1].isupper() or last in MUTABLE_CALLS
    return constructs or dotted(function) in PURE_CALLS or last in PURE_METHODS


def _awaits_a_missing_package(node: ast.Try) -> bool:
    caught = [dotted(h.type) if h.type is not None else "" for h in node.handlers]
    known = {"ImportError", "ModuleNotFoundError"}
    return bool(caught) and set(caught) <= known and not node.finalbody


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Tuple):
        return any(map(_is_mutable, value.elts))
    if isinstance(value, ast.IfExp):
        return _is_mutable(value.body) or _is_mutable(value.orelse)
    if isinstance(value, ast.BinOp):
        return _is_mutable(value.left)
    if isinstance(value, ast.Call):
        return last_name(value.func) in MUTABLE_CALLS
    return isinstance(value, DISPLAYS)


def _is_thawed_dataclass(node: ast.AST) -> bool:
    marks = node.decorator_list if isinstance(node, ast.ClassDef) else []
    bare = any(last_name(mark) == "dataclass" for mark in marks)
    calls = [m for m in marks if isinstance(m, ast.Call) and last_name(m.func) == "dataclass"]
    return bare or any("frozen=True" not in ast.unparse(call) for call in calls)


def _speaks_for_itself(source: Source, node: ast.AST) -> bool:
    """Whether it is a property of one statement, or a method of a class that has bases."""
    if isinstance(node, ast.ClassDef):
        return False
    marks = [dotted(mark) for mark in getattr(node, "decorator_list", [])]
    if "property" in marks and len(getattr(node, "body", [])) == 1:
        return True
    return any(
        node in parent.body and parent.bases
        for parent in ast.walk(source.tree)
        if isinstance(parent, ast.ClassDef)
    )


def _is_check(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Assert)
    name = last_name(node.func).lstrip("_")
    return name.startswith(("assert_", "check_")) or dotted(node.func) in (
        "pytest.raises",
        "pytest.warns",
    )
