"""`mor eval` against lm-eval's model class `hf`: seconds and scores of both on the same items."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import MissingExtraError
from mor.eval.harness import HFStyleTokenizer, evaluate, run_tasks
from mor.eval.local_tasks import write_tasks
from mor.eval.scoring import EngineScorer
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer


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
    seconds: list[dict[str, float]] = []
    scores: dict[str, dict[str, Any]] = {"mor": {}, "hf": {}}
    with tempfile.TemporaryDirectory(prefix="mor-eval-") as folder:
        write_tasks(list(items), data, Path(folder))
        for warm in (True, *(False for _ in range(rounds))):
            taken = {"mor": 0.0, "hf": 0.0}
            for task, count in items.items():
                options: dict[str, Any] = {"include": [Path(folder)], "limit": 2 if warm else count}
                scorer.llm.reset_prefix_cache()
                began = time.perf_counter()
                scores["mor"] |= evaluate(scorer, hf_tokenizer, [task], **options)
                between = time.perf_counter()
                scores["hf"] |= run_tasks(lambda: theirs, [task], **options)
                taken["mor"] += between - began
                taken["hf"] += time.perf_counter() - between
            if not warm:
                seconds.append(taken)
    ratios = sorted(taken["hf"] / taken["mor"] for taken in seconds)
    return {
        "items": dict(items),
        "hf_batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "ratio": ratios[len(ratios) // 2],
        "scores": scores,
    }
