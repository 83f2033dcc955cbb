"""The Python of docs/fine-tuning.md, as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from mor.io import hf_export
from mor.io.checkpoint import load, save
from mor.io.tokenizer import Tokenizer
from tiny import tiny_model

GUIDE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
TEXT = "the token goes on and the other token stops; the block is the same for both. "


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_its_python_runs_and_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.train([TEXT * 4], 280)
    model = tiny_model(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id).float()
    save(model, tmp_path / "run", tokenizer)
    hf_export.export(tmp_path / "run", tmp_path / "exported" / "mor3")
    (tmp_path / "my.txt").write_text(TEXT * 60)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL):
        exec(compile(code, str(GUIDE), "exec"), names)
    for losses in (names["losses"], names["lora_losses"]):
        assert len(losses) == 20
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3])
    assert len(names["completion"].recursion_counts) > 0
    merged, before = load(tmp_path / "tuned" / "merged"), model.state_dict()
    changed = {n for n, v in merged.state_dict().items() if not v.equal(before[n])}
    assert changed
    assert all(n.startswith("block.") for n in changed)
