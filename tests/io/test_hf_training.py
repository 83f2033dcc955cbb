"""Fine-tuning with `Trainer` and PEFT, and `lm_eval --model hf`, on our models."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_models import random_ids, wrapped
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mor.io import hf_export
from mor.io.checkpoint import load, save
from mor.io.hf.auto_model import MoRForCausalLM
from mor.io.tokenizer import Tokenizer
from tiny import tiny_model

# transformers 5.23 has a new name for it, which PEFT and older versions do not know.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"
)


def _model() -> MoRForCausalLM:
    return wrapped(tiny_model().float())


def _rows(num: int) -> list[dict[str, Any]]:
    """Sequences of two lengths that repeat themselves, so that there is something to learn."""
    rows = []
    for number in range(num):
        ids = random_ids(4, seed=number % 3).repeat(5 - number % 2)
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(row: torch.Tensor, value: int) -> torch.Tensor:
        return torch.nn.functional.pad(row, (0, width - len(row)), value=value)

    return {
        "input_ids": torch.stack([padded(row["input_ids"], 0) for row in rows]),
        "labels": torch.stack([padded(row["labels"], -100) for row in rows]),
        "attention_mask": torch.stack([padded(row["input_ids"] * 0 + 1, 0) for row in rows]),
    }


def _train(model: Any, folder: Path, **settings: Any) -> list[float]:
    """20 steps; the loss of every step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=20,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **settings,
    )
    rows = _rows(24)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=_collate,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < 4
    trainer.save_model(str(folder / "saved"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_trainer_lowers_the_loss(tmp_path: Path) -> None:
    model = _model()
    losses = _train(model, tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert len(losses) == 20
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    saved = load(tmp_path / "saved")
    for name, value in model.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value), name


def test_lora_on_the_shared_block_lowers_the_loss(tmp_path: Path) -> None:
    base = _model()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=16,
        target_modules=r"model\.block\.\d+\.(self_attn\.[qv]_proj|mlp\.down_proj)",
    )
    model = peft.get_peft_model(base, lora)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 3 * 2
    assert all("block" in name and "lora" in name for name in trained)
    frozen = base.model.embed_tokens.weight.clone()
    losses = _train(model, tmp_path)
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert torch.equal(base.model.embed_tokens.weight, frozen)

    ids = random_ids(1, 12)
    expected = model.eval()(ids)
    again = peft.PeftModel.from_pretrained(_model(), tmp_path / "saved").eval()
    torch.testing.assert_close(again(ids).logits, expected.logits)
    tokens = again.generate(input_ids=ids, max_new_tokens=6)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=6), tokens)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        load(tmp_path / "merged").block[0].self_attn.q_proj.weight,
        merged.model.block[0].self_attn.q_proj.weight,
    )


TASK = """
task: tiny_pairs
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: ""
target_delimiter: ""
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: label
num_fewshot: 0
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_lm_eval_runs_on_an_exported_folder(tmp_path: Path) -> None:
    text = "the token goes on and the other token stops "
    tokenizer = Tokenizer.train([text * 4], 280)
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id).float()
    save(model, tmp_path / "run", tokenizer)
    folder = hf_export.export(tmp_path / "run", tmp_path / "exported")
    words = text.split()
    pairs: list[dict[str, Any]] = [
        {"good": f"the token {a} {b}", "bad": f"the {b} {a} token", "label": 0}
        for a in words[3:6]
        for b in words[5:9]
        if a != b
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=data))
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['mor'] = None\n"
         "from lm_eval.__main__ import cli_evaluate; cli_evaluate()",
         "--model", "hf", "--model_args", arguments, "--tasks", "tiny_pairs", "--device", "cpu",
         "--include_path", str(tmp_path / "tasks"), "--batch_size", "4",
         "--output_path", str(tmp_path / "found.json")],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = tmp_path.glob("found*.json")
    accuracy = json.loads(found.read_text())["results"]["tiny_pairs"]["acc,none"]

    def score(words: str) -> float:
        """Log-probability of a text after the end of text, as lm_eval asks for it."""
        ids = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(words)]])
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(-1)
        return float(logits[0, :-1].gather(1, ids[0, 1:, None]).sum())

    expected = sum(score(pair["good"]) >= score(pair["bad"]) for pair in pairs) / len(pairs)
    assert accuracy == pytest.approx(expected)
    assert 0 < accuracy < 1


def test_the_loss_of_accumulated_batches_is_that_of_one_batch() -> None:
    model = wrapped(tiny_model("token")).train()  # token choice: no draw depends on the batch
    batch = _collate(_rows(4))
    predicted = int((batch["labels"][:, 1:] != -100).sum())
    whole = model(**batch, num_items_in_batch=predicted)
    parts = [
        model(**{k: v[rows] for k, v in batch.items()}, num_items_in_batch=predicted)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    language = [out.loss - out.aux_loss * _share(batch, rows, predicted)
                for out, rows in zip(parts, (slice(0, 2), slice(2, 4)), strict=True)]  # fmt: skip
    torch.testing.assert_close(sum(language), whole.loss - whole.aux_loss, rtol=0, atol=1e-10)


def _share(batch: dict[str, torch.Tensor], rows: slice, predicted: int) -> float:
    return float((batch["labels"][rows, 1:] != -100).sum()) / predicted


def test_auto_classes_build_a_model_to_train(tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").train()
    ids = random_ids(2, 16)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.aux_loss > 0
    assert model.model.router.routers[1].proj.weight.grad.abs().sum() > 0
