"""Type checks of mor while the tests run, in a fraction of the time that jaxtyping's hook takes.

The hook gives every function two type checkers, checks arguments twice, and keeps a table of axes
for every call. The table is kept here for functions that name axes, and one type checker does the
rest: the same arguments and results are checked.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, ForwardRef, Literal, get_args, get_origin
from unittest.mock import patch

import jaxtyping
from jaxtyping import _import_hook

Checker = Callable[..., Any]


def _parts(hint: Any) -> Iterator[Any]:
    """An annotation, and those that it is made of."""
    yield hint
    for part in hint if isinstance(hint, list) else get_args(hint):
        if get_origin(hint) is not Literal:
            yield from _parts(part)


def _check(
    function: Callable[..., Any], whole: Checker, typechecker: Checker
) -> Callable[..., Any]:
    """The function with checks; `whole` is what jaxtyping would do."""
    parts = [p for hint in inspect.get_annotations(function).values() for p in _parts(hint)]
    if any(isinstance(part, str | ForwardRef) for part in parts):
        return whole(function, typechecker=typechecker)  # it knows names that come later
    checked = typechecker(function)
    if any(isinstance(p, type) and issubclass(p, jaxtyping.AbstractArray) for p in parts):
        return whole(checked, typechecker=None)
    return checked


def check_less_often() -> None:
    """Have jaxtyping's import hook do no more than is needed."""
    whole = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Checker) -> Callable[[Any], Any]:
        def decorate(target: Any) -> Any:
            if isinstance(target, FunctionType):
                return _check(target, whole, typechecker)
            if not _has_made_init(target):
                return whole(target, typechecker=typechecker)
            target.__init__ = _check(target.__init__, whole, typechecker)
            return target

        return decorate

    jaxtyping.jaxtyped = jaxtyped
    _import_hook._JaxtypingLoader.exec_module = _exec_module


def _has_made_init(target: Any) -> bool:
    """Whether this is a dataclass that is to be checked, with an `__init__` of its own."""
    is_one = dataclasses.is_dataclass(target) and "__init__" in vars(target)
    return is_one and not getattr(target, "__no_type_check__", False)


def _exec_module(self: _import_hook._JaxtypingLoader, module: ModuleType) -> None:
    """Import a module of mor; what it imports from elsewhere keeps its compiled files."""
    name = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", name):
        code = self.get_code(module.__name__)
    exec(code, module.__dict__)
