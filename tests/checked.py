"""Type checks of mor while the tests run, in a fraction of the time that jaxtyping's hook takes.

The hook gives every function two type checkers and every call a table of axes. Only functions that
name axes need that; the others get one type checker, which checks the same arguments and results.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

import jaxtyping
from jaxtyping import _import_hook

Checker = Callable[..., Any]


def names_axes(function: Callable[..., Any]) -> bool:
    """Whether an annotation speaks of axes, or may do so: one that is text still."""
    for hint in inspect.get_annotations(function).values():
        if isinstance(hint, type) and not issubclass(hint, jaxtyping.AbstractArray):
            continue
        if "jaxtyping" in repr(hint) or "'" in repr(hint):
            return True
    return False


def check_less_often() -> None:
    """Have jaxtyping's import hook leave functions without axes to the type checker alone."""
    original = jaxtyping.jaxtyped

    def jaxtyped(*, typechecker: Checker) -> Callable[[Any], Any]:
        def decorate(target: Any) -> Any:
            if isinstance(target, FunctionType) and not names_axes(target):
                return typechecker(target)
            if has_made_init(target) and not names_axes(target.__init__):
                target.__init__ = typechecker(target.__init__)
                return target
            return original(target, typechecker=typechecker)

        return decorate

    jaxtyping.jaxtyped = jaxtyped
    _import_hook._JaxtypingLoader.exec_module = exec_module


def has_made_init(target: Any) -> bool:
    """Whether this is a dataclass that is to be checked, with an `__init__` of its own."""
    is_one = dataclasses.is_dataclass(target) and "__init__" in vars(target)
    return is_one and not getattr(target, "__no_type_check__", False)


def exec_module(self: _import_hook._JaxtypingLoader, module: ModuleType) -> None:
    """Import a module of mor; what it imports from elsewhere keeps its compiled files."""
    name = partial(_import_hook._optimized_cache_from_source, self._typechecker.get_hash())
    with patch("importlib._bootstrap_external.cache_from_source", name):
        code = self.get_code(module.__name__)
    exec(code, module.__dict__)
