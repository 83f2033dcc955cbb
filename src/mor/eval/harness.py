"""Tasks of lm-evaluation-harness on our models: `mor.eval.scoring` behind lm-eval's interface."""

import contextlib
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mor.errors import ConfigError, DataError, MissingExtraError, RequestError, nearest
from mor.eval.scoring import LoglikelihoodRequest, Scorer
from mor.io.tokenizer import END_OF_TEXT, Tokenizer
from mor.model.config import MoRConfig
from mor.model.sampling import SamplingParams

_MAX_TOKENS = 256  # that a task generates if it does not say how many
_BOOTSTRAPS = 100  # for the standard error of what is not a mean


class HFStyleTokenizer:
    """Text into ids as `transformers` would: special tokens are recognized, a BOS comes first where
    the tokenizer says so."""

    def __init__(
        self, tokenizer: Tokenizer, config: MoRConfig, prefix_id: int | None = None
    ) -> None:
        """Args as they are; `prefix_id` None: see the attribute.

        Raises:
            ConfigError: the model has no token `prefix_id`.
        """
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        end = config.eos_token_id
        self.end_id = tokenizer.eos_id if end is None else end
        """Ends a text."""
        begin = self.end_id if config.bos_token_id is None else config.bos_token_id
        between = self._backend.token_to_id(END_OF_TEXT)
        known = (prefix_id, between, begin)
        self.prefix_id = next(token for token in known if token is not None)
        """The context of a text without context: what is between documents in pre-training, as far
        as one can tell; a chat model's BOS opens a message instead."""
        if not 0 <= self.prefix_id < config.vocab_size:
            raise ConfigError(
                f"prefix token {self.prefix_id} is outside 0..{config.vocab_size - 1}."
            )
        self._prefix = self._backend.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Ids; None adds special tokens unless the text begins with one already."""
        if special is None:
            special = not (self._prefix and text.startswith(self._prefix))
        return self._backend.encode(text, add_special_tokens=special).ids


def evaluate(
    scorer: Scorer,
    words: HFStyleTokenizer,
    tasks: Sequence[str],
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, dict[str, float | None]]:
    """Scores of each task on one of our models; see `run_tasks` for the options.

    Args:
        on_progress: hears how many of how many requests are done.

    Raises:
        RequestError: an item does not fit the model, or the scorer cannot generate.
        ConfigError, MissingExtraError: as `run_tasks`.
    """
    return run_tasks(lambda: _model(scorer, words, on_progress), tasks, **options)


def run_tasks(
    model: Callable[[], Any],
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 1234,
) -> dict[str, dict[str, float | None]]:
    """Scores of each task, by metric; `<metric>_stderr` is its standard error.

    Args:
        model: makes a model of lm-eval.
        tasks: names of tasks or groups.
        include: folders of task files; a name in none of them is one of lm-eval's own tasks, whose
            data it downloads.
        num_fewshot: examples before each item; None: as the task says.
        limit: items of each task; None: all.
        seed: of the choice of examples.

    Raises:
        ConfigError: no such task.
        MissingExtraError: the extra `eval` is not installed.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    folders: list[Path | str] = list(include)
    with _quiet():
        manager = TaskManager(include_path=folders or None, include_defaults=False)
        missing = [name for name in tasks if name not in manager.task_index]
        if missing:
            manager = TaskManager(include_path=folders or None)
            unknown = [name for name in missing if name not in manager.task_index]
            if unknown:
                hint = nearest(unknown[0], manager.task_index)
                raise ConfigError(f"task {unknown[0]!r} is unknown: {hint:.300}")
        found = simple_evaluate(
            model=model(),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            fewshot_random_seed=seed,
        )
    assert found is not None
    return {name: _scores(values) for name, values in found["results"].items()}


def _scores(values: Mapping[str, Any]) -> dict[str, float | None]:
    """`acc,none` as `acc`, other filters in the name; what is no number is left out."""
    scores: dict[str, float | None] = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if not filtered:
            continue
        name = metric if filtered == "none" else f"{metric}[{filtered}]"
        if isinstance(value, (int, float)) and math.isfinite(value):
            scores[name] = float(value)
        else:
            scores[name] = None
    return scores


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """lm-eval tells of every step; here only its errors are heard."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _model(scorer: Scorer, words: HFStyleTokenizer, on_progress: Callable[[int, int], None]) -> Any:
    """The scorer as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Model(TemplateLM):
        """What lm-eval calls."""

        @property
        def eot_token_id(self) -> int:
            return words.end_id

        @property
        def prefix_token_id(self) -> int:
            return words.prefix_id

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return words.encode(string, add_special_tokens)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [
                LoglikelihoodRequest(tuple(context), tuple(after)) for _, context, after in requests
            ]
            return [tuple(score) for score in _watched(scorer, pairs, on_progress)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            pairs: list[LoglikelihoodRequest] = []
            owners: list[int] = []
            for number, request in enumerate(requests):
                for window in get_rolling_token_windows(
                    token_list=words.encode(request.args[0]),
                    prefix_token=words.prefix_id,
                    max_seq_len=scorer.max_length - 1,
                    context_len=1,
                ):
                    context, after = make_disjoint_window(window)
                    pairs.append(LoglikelihoodRequest(tuple(context), tuple(after)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, score in zip(owners, _watched(scorer, pairs, on_progress), strict=True):
                totals[owner] += score.logprob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            asked = [_request(words, scorer.max_length, *request.args) for request in requests]
            return scorer.generate([prompt for prompt, _ in asked], [params for _, params in asked])

    return Model()


def _watched(
    scorer: Scorer, pairs: list[LoglikelihoodRequest], on_progress: Callable[[int, int], None]
) -> Any:
    """Scores of the pairs, each different pair computed once."""
    different = list(dict.fromkeys(pairs))
    finished = 0

    def done(count: int) -> None:
        nonlocal finished
        finished += count
        on_progress(finished, len(different))

    scores = dict(zip(different, scorer.score(different, done), strict=True))
    return [scores[pair] for pair in pairs]


def _request(
    words: HFStyleTokenizer, max_length: int, context: str, settings: Mapping[str, Any]
) -> tuple[list[int], SamplingParams]:
    """Prompt and params of a text to be generated."""
    until = settings.get("until") or []
    stop = tuple(s for s in ([until] if isinstance(until, str) else until) if s)
    max_tokens = int(settings.get("max_gen_toks", _MAX_TOKENS))
    room = max_length + 1 - max_tokens
    if room < 1:
        raise RequestError(
            f"max_gen_toks={max_tokens} does not fit this model: {max_length} at most."
        )
    sampled = settings.get("do_sample", False)
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=stop,
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)) if sampled else 1.0,
        )
    except (TypeError, ValueError) as error:
        raise DataError(f"the task's generation_kwargs cannot be used: {error}") from error
    return words.encode(context)[-room:] or [words.prefix_id], params
