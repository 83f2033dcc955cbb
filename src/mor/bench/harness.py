"""`mor eval` against lm-eval's model class `hf`: seconds and scores of both on the same items."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import MissingExtraError
from mor.eval.harness import HFStyleTokenizer, evaluate, run_tasks
from mor.eval.local_tasks import write_tasks
from mor.eval.scoring import EngineScorer
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer


class _Round(NamedTuple):
    """Seconds and scores of all tasks once, under the keys `mor` and `hf`."""

    seconds: dict[str, float]
    scores: dict[str, dict[str, Any]]


def measure(
    model: str, exported: str, data: Path, items: Mapping[str, int], batch_size: int, rounds: int
) -> dict[str, Any]:
    """Seconds and scores of both; `ratio` is the median over rounds of hf's seconds over ours.

    Models are loaded and kernels compiled before the clock starts; then both read the same task
    files and score the same items, in turns.

    Args:
        model: a checkpoint's folder.
        exported: the same model as `mor convert to-hf` wrote it, or as transformers did.
        data: folder of the tasks' data.
        items: by task, how many items are scored.
        batch_size: of `hf`.

    Raises:
        MissingExtraError: lm-eval or transformers is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    tokenizer = Tokenizer.load(resolve(model))
    loaded = load(model)
    hf_tokenizer = HFStyleTokenizer(tokenizer, loaded.config)
    settings = EngineConfig(max_num_seqs=128, chunked_prefill_size=512, kv_cache_memory_bytes=2**30)
    scorer = EngineScorer(LLM(loaded, settings, tokenizer=tokenizer))
    theirs = HFLM(
        pretrained=exported,
        trust_remote_code=True,
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        prefix_token_id=hf_tokenizer.prefix_id,
    )
    with tempfile.TemporaryDirectory(prefix="mor-eval-") as folder:
        write_tasks(list(items), data, Path(folder))

        def score(limits: Mapping[str, int]) -> _Round:
            return _score_all(scorer, hf_tokenizer, theirs, Path(folder), limits)

        score(dict.fromkeys(items, 2))  # warms up: two items of each task
        measured = [score(items) for _ in range(rounds)]
    seconds = [round_.seconds for round_ in measured]
    ratios = sorted(taken["hf"] / taken["mor"] for taken in seconds)
    return {
        "items": dict(items),
        "hf_batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": ratios[len(ratios) // 2],
        "scores": measured[-1].scores,
    }


def _score_all(
    scorer: EngineScorer,
    hf_tokenizer: HFStyleTokenizer,
    theirs: Any,
    folder: Path,
    limits: Mapping[str, int],
) -> _Round:
    """Score the first items of each task with both, one task after the other.

    Args:
        theirs: lm-eval's model.
        folder: of the task files.
        limits: by task, how many items are scored.
    """
    taken = {"mor": 0.0, "hf": 0.0}
    scores: dict[str, dict[str, Any]] = {"mor": {}, "hf": {}}
    for task, limit in limits.items():
        options: dict[str, Any] = {"include": [folder], "limit": limit}
        scorer.llm.reset_prefix_cache()  # what an earlier round left there would make this quicker
        began = time.perf_counter()
        scores["mor"] |= evaluate(scorer, hf_tokenizer, [task], **options)
        between = time.perf_counter()
        scores["hf"] |= run_tasks(lambda: theirs, [task], **options)
        taken["mor"] += between - began
        taken["hf"] += time.perf_counter() - between
    return _Round(taken, scores)
