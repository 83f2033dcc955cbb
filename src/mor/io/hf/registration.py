"""MoR among the auto classes of `transformers`, from the moment that those are there.

After `import mor`, `AutoModelForCausalLM.from_pretrained(dir)` knows our models. `import mor` must
stay quick, so it does not import `transformers`; it leaves a watcher among Python's importers that
registers the classes when `transformers` has loaded its auto classes, and then goes away.
"""

import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto"


def watch() -> None:
    """Register now if the auto classes are loaded already, otherwise as soon as they are."""
    known = any(isinstance(finder, _Watcher) for finder in sys.meta_path)
    if not known and not _registered():
        sys.meta_path.insert(0, _Watcher())


def _registered() -> bool:
    """Registers what can be registered by now; whether that was all."""
    loaded = [f"{_AUTO}.{part}_auto" in sys.modules for part in ("configuration", "modeling")]
    if not any(loaded):
        return False
    try:
        from transformers import AutoConfig

        from mor.io.hf.configuration import MoRPretrainedConfig

        AutoConfig.register(MoRPretrainedConfig.model_type, MoRPretrainedConfig, exist_ok=True)
        if all(loaded):
            from transformers import AutoModelForCausalLM

            from mor.io.hf.auto_model import MoRForCausalLM

            AutoModelForCausalLM.register(MoRPretrainedConfig, MoRForCausalLM, exist_ok=True)
    except ImportError as error:
        warnings.warn(
            f"mor's models are not registered with transformers, of which 4.57 or newer is needed: "
            f"{error}",
            stacklevel=2,
        )
        return True
    return all(loaded)


class _Watcher:
    """A finder that finds what Python finds anyway, and looks when `transformers` is at rest.

    Its modules import each other in circles: only after the outermost import are all whole.
    """

    def __init__(self) -> None:
        self._running = 0

    def find_spec(
        self, name: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, its execution watched; None for what is not of `transformers`."""
        if not name.startswith("transformers."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def watched(module: ModuleType) -> None:
                self._running += 1
                try:
                    run(module)
                    if self._running == 1 and self in sys.meta_path and _registered():
                        sys.meta_path.remove(self)
                finally:
                    self._running -= 1

            spec.loader.exec_module = watched  # pyrefly: ignore[method-assign]
        return spec
