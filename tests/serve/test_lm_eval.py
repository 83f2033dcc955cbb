"""lm-eval's `local-completions` against the server gives the scores of the model's own forward."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import KEY, NAME, LiveServer

import mor
from mor.engine.llm import LLM

QUESTIONS = [
    {"text": "the cat sat on the", "choices": [" mat", " rat", " 猫"], "label": 0},
    {"text": "the cat ate the", "choices": [" rat", " café", " the mat, the cat"], "label": 0},
    {"text": "naïve", "choices": [" café", " cat"], "label": 0},
]
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def expected(model: mor.MoRModel, engine: LLM, text: str, choice: str) -> tuple[float, bool]:
    """Log-likelihood of a choice after a text, and whether it is what greedy decoding says."""
    context = engine.tokenizer.encode(text)
    ids = engine.tokenizer.encode(text + choice)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), selection="threshold").logits[0].log_softmax(-1)
    places = range(len(context), len(ids))
    scores = [float(logits[at - 1, ids[at]]) for at in places]
    return sum(scores), all(int(logits[at - 1].argmax()) == ids[at] for at in places)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_the_model(
    server: LiveServer, model: Path, engine: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    arguments = {
        "model": NAME,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(model),
        "tokenizer_backend": "huggingface",
        "max_length": 200,
        "num_concurrent": 1,
    }
    found: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["tiny_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    network = mor.load(model)
    correct = 0
    for question, sample in zip(QUESTIONS, found["samples"]["tiny_choice"], strict=True):
        want = [expected(network, engine, question["text"], c) for c in question["choices"]]
        got = [(float(score), greedy in (True, "True")) for ((score, greedy),) in sample["resps"]]
        for (score, greedy), (other, also) in zip(got, want, strict=True):
            assert score == pytest.approx(other, abs=1e-6)
            assert greedy == also
        scores = [score for score, _ in want]
        correct += scores.index(max(scores)) == question["label"]
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(correct / len(QUESTIONS))
