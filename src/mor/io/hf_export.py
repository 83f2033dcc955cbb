"""Write a model as a folder that `transformers` loads with `trust_remote_code`, without mor.

    config.json  generation_config.json  model.safetensors  README.md
    configuration_mor.py  modeling_mor.py
    tokenizer.json  tokenizer_config.json

The two code files are put together from this package's own source files when a model is exported,
so that the model exists once and cannot differ. Nothing here needs `transformers`; the classes that
do are in `mor.io.hf`.
"""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mor.errors import CheckpointError, DataError
from mor.io.atomic_files import staged_folder, storage_error
from mor.io.checkpoint import CONFIG, GENERATION, load, resolve, write_model
from mor.io.model_card import model_card, write_card
from mor.io.tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILE, Tokenizer
from mor.io.weights import read_json
from mor.model.config import MoRConfig

AUTO_MAP: Mapping[str, str] = MappingProxyType(
    {
        "AutoConfig": "configuration_mor.MoRPretrainedConfig",
        "AutoModelForCausalLM": "modeling_mor.MoRForCausalLM",
    }
)
# The modules of each code file, in an order in which everything is defined before its use.
_CODE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "configuration_mor": (
            "mor.errors",
            "mor.validation",
            "mor.model.kv_policy",
            "mor.model.presets",
            "mor.model.config",
            "mor.io.hf.configuration",
        ),
        "modeling_mor": (
            "mor.ops.cross_entropy",
            "mor.ops.memory_efficient",
            "mor.ops.low_rank",
            "mor.ops.document_attention",
            "mor.model.sharing",
            "mor.model.ragged_batch",
            "mor.model.depth_lora",
            "mor.model.norm",
            "mor.model.attention",
            "mor.model.layers",
            "mor.model.router",
            "mor.model.transformer",
            "mor.io.hf.cache",
            "mor.io.hf.padded_tokens",
            "mor.io.hf.modeling",
        ),
    }
)
_SHAPES = re.compile(r'\b(?:Float|Int|Bool|Shaped)\[Tensor, "[^"]*"\]')


def export(source: Path | str, out: Path | str, *, dtype: torch.dtype | None = None) -> Path:
    """Write a checkpoint, or a run's newest one, as a folder for `transformers`; returns it.

    Args:
        out: a folder that does not exist yet.
        dtype: of the parameters; None keeps the checkpoint's.

    Raises:
        CheckpointError: the source is no usable model, or `out` exists or cannot be written.
        CapacityError: the disk is full; then `out` does not exist.
    """
    folder, target = resolve(source), Path(out)
    if target.exists():
        raise CheckpointError(f"{target} exists: choose a new folder, or remove it first.")
    model = load(folder, dtype=dtype)
    tokenizer = Tokenizer.load(folder) if (folder / TOKENIZER_FILE).is_file() else None
    model.config = _with_end_of_text(model.config, tokenizer)
    if tokenizer is not None and TOKENIZER_CONFIG not in tokenizer.sidecar_files:
        tokenizer.sidecar_files[TOKENIZER_CONFIG] = _tokenizer_json(model.config, tokenizer)
    try:
        with staged_folder(target) as staged:
            write_model(model, staged, tokenizer)
            _add_json(staged / CONFIG, {"auto_map": dict(AUTO_MAP)})
            if (folder / GENERATION).is_file():  # may say more than the model, e.g. several ends
                _add_json(staged / GENERATION, read_json(folder / GENERATION))
            write_card(staged, _card(model.config, target.name, folder.name))
            write_code(staged)
    except OSError as error:
        raise storage_error(target, error, CheckpointError) from error
    return target


def write_code(folder: Path) -> None:
    """Write `configuration_mor.py` and `modeling_mor.py` into a folder."""
    for name in _CODE:
        (folder / f"{name}.py").write_text(code(name), encoding="utf-8")


def code(name: str) -> str:
    """The text of a code file: its modules one after another, all imports at the top.

    Imports of mor's modules go, or become imports of the other code file; shapes such as
    `Float[Tensor, "n e"]` become `Tensor`, so that jaxtyping is not needed.

    Args:
        name: `configuration_mor` or `modeling_mor`.
    """
    imports: set[str] = set()
    elsewhere: dict[str, set[str]] = {}  # code file -> names that this one takes from it
    bodies = []
    for module in _CODE[name]:
        text = _SHAPES.sub("Tensor", _source(module).read_text(encoding="utf-8"))
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            # An import may take several lines; all are blanked, so that line numbers stay.
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[number - 1] = ""
            origin = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if origin.startswith("mor."):
                home = next(file for file, parts in _CODE.items() if origin in parts)
                elsewhere.setdefault(home, set()).update(alias.name for alias in node.names)
            elif origin != "jaxtyping":
                imports.add(ast.unparse(node))
        bodies.append(f"# -- {module} " + "-" * 40 + "\n\n" + "\n".join(lines).strip())
    imports |= {
        f"from .{home} import {', '.join(sorted(names))}"
        for home, names in elsewhere.items()
        if home != name
    }
    header = (
        "# Put together by `mor convert to-hf` from the sources of mixture-of-recursions\n"
        "# (Apache-2.0): change those, not this file.\n"
    )
    ordered = sorted(imports, key=lambda line: (line.startswith("from ."), line))
    return "\n".join([header, *ordered]) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def _source(module: str) -> Path:
    return Path(__file__).parents[1].joinpath(*module.split(".")[1:]).with_suffix(".py")


def _with_end_of_text(config: MoRConfig, tokenizer: Tokenizer | None) -> MoRConfig:
    """The config, its `eos_token_id` taken from the tokenizer if it has none, as in the engine."""
    if config.eos_token_id is None and tokenizer is not None:
        try:
            return replace(config, eos_token_id=tokenizer.eos_id)
        except DataError:
            pass  # a tokenizer without an end of text: generation ends at its length
    return config


def _tokenizer_json(config: MoRConfig, tokenizer: Tokenizer) -> str:
    """Text of `tokenizer_config.json`; it pads on the left, with the end of text if need be."""
    ids = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id,
        "pad_token": config.eos_token_id if config.pad_token_id is None else config.pad_token_id,
    }
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_position_embeddings,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.decode([i]) for name, i in ids.items() if i is not None},
    }
    return json.dumps(values, indent=2) + "\n"


def _add_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(read_json(file) | values, indent=2) + "\n", encoding="utf-8")


def _card(config: MoRConfig, name: str, source: str) -> str:
    """Text of the model card, with the code that loads the folder."""
    origin = f"Written by `mor convert to-hf` from `{source}`; its code files need no `mor`."
    use = _USE.splitlines()
    return model_card(config, name=name, origin=origin, library="transformers", use=use)


_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
print(tokenizer.decode(out.sequences[0]), out.recursion_counts[0])
```

`generate` takes `num_recursions` (every token takes exactly so many) and `max_recursions`.
With `mixture-of-recursions` installed, `mor generate` and `mor eval` read this folder, too.
"""
