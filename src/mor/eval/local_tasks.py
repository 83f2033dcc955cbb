"""Write evaluation sets that lie in files as tasks of lm-eval, which then needs no network.

A set is `NAME.jsonl` or `NAME.jsonl.zst` with one item a line; `docs/ecosystem.md` has the fields.
Items are shuffled once, always in the same way, so that the first N of a limit are a sample.
"""

import io
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mor.errors import DataError, MissingExtraError, nearest

_CHOICES: Mapping[str, Any] = MappingProxyType(
    {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
)
_ACC: Mapping[str, Any] = MappingProxyType(
    {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
)
_FILES: Mapping[str, str] = MappingProxyType(  # task -> name of its set, where they differ
    {"lambada": "lambada_openai", "mmlu": "mmlu_test", "gsm8k": "gsm8k_test"}
)
TASKS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "arc_challenge": _CHOICES,
        "arc_easy": _CHOICES,
        "hellaswag": _CHOICES,
        "mmlu": _CHOICES,
        "openbookqa": _CHOICES,
        "piqa": _CHOICES,
        "blimp": {  # the likelihood of whole sentences
            **_CHOICES,
            **_ACC,
            "doc_to_text": "",
            "doc_to_choice": "{{[good, bad]}}",
            "doc_to_target": 0,
            "target_delimiter": "",
        },
        "winogrande": {  # the same continuation after each context
            **_CHOICES,
            **_ACC,
            "doc_to_text": "gold",
            "doc_to_choice": "contexts",
            "doc_to_target": "continuation",
        },
        "lambada": {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "{{' ' + target}}",
            "metric_list": [
                {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        "gsm8k": {
            "output_type": "generate_until",
            "fewshot_split": "train",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": ["Question:"], "do_sample": False},
            "filter_list": [
                {
                    "name": "strict-match",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [
                {
                    "metric": "exact_match",
                    "aggregation": "mean",
                    "higher_is_better": True,
                    "ignore_case": True,
                    "regexes_to_ignore": [",", r"(?s).*#### ", r"\.$"],
                }
            ],
        },
    }
)
"""For each task the keys of lm-eval's YAML besides its name and files."""


def write_tasks(names: Sequence[str], data: Path, folder: Path) -> None:
    """Write the named tasks into a folder that lm-eval takes as `include_path`.

    Args:
        data: folder of the sets.
        folder: gets a YAML and the items of each task, and lm-eval's cache of the items.

    Raises:
        DataError: a set is missing or damaged; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        splits = {"test": _FILES.get(name, name)}
        if TASKS[name].get("fewshot_split") == "train":
            splits["train"] = f"{name}_train"
        files = {}
        for split, file in splits.items():
            items = list(read_set(data, file))
            random.Random(0).shuffle(items)  # so that the first N are a sample
            path = folder.resolve() / f"{name}.{split}.jsonl"
            path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
            files[split] = str(path)
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder.resolve() / "cache")},
            "test_split": "test",
            **TASKS[name],
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def read_set(data: Path, name: str) -> Iterator[dict[str, Any]]:
    """The items of the set `data/NAME.jsonl` or `data/NAME.jsonl.zst`.

    Raises:
        DataError: it is missing, damaged, or an item is no JSON object.
        MissingExtraError: it is compressed and zstandard is not installed.
    """
    plain, compressed = data / f"{name}.jsonl", data / f"{name}.jsonl.zst"
    if not plain.is_file() and not compressed.is_file():
        known = [f.name.split(".")[0] for f in data.glob("*.jsonl*")]
        raise DataError(f"{data} has no {plain.name} or {compressed.name}: {nearest(name, known)}")
    path = plain if plain.is_file() else compressed
    empty = True
    for number, line in enumerate(_lines(path), start=1):
        try:
            item = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {number}: not JSON ({error}).") from error
        if not isinstance(item, dict):
            raise DataError(f"{path} line {number}: must hold a JSON object.")
        yield item
        empty = False
    if empty:
        raise DataError(f"{path} holds no items.")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file, plain or compressed by zstandard."""
    if path.suffix != ".zst":
        with path.open(encoding="utf-8") as file:
            yield from file
        return
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtraError("zstandard", "data") from error
    try:
        with path.open("rb") as file:
            decompressed = zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(file)
            yield from io.TextIOWrapper(decompressed, "utf-8")
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): copy it again.") from error
