"""Exported folders: read by mor, by `transformers` with mor, and by `transformers` without it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_models import wrapped
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mor.errors import CheckpointError
from mor.io import hf_export
from mor.io.checkpoint import load, save
from mor.io.hf.auto_model import MoRForCausalLM
from mor.io.tokenizer import Tokenizer
from mor.model import cost
from mor.model.generation import generate
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from tiny import tiny_model

TEXT = "a token goes on, another token stops; the block is the same for both. " * 4
# Runs where mor cannot be imported.
WITHOUT_MOR = """
import json, sys
sys.modules["mor"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, again, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
inputs = tokenizer(prompt, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=24, return_dict_in_generate=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True, dtype="auto")
print(json.dumps({
    "module": type(model).__module__,
    "ids": inputs["input_ids"][0].tolist(),
    "tokens": out.sequences[0, -24:].tolist(),
    "counts": out.recursion_counts[0, -24:].tolist(),
    "again": model.generate(**inputs, max_new_tokens=24)[0, -24:].tolist(),
    "tied": model.model.lm_head.weight is model.model.embed_tokens.weight,
}))
"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 280)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> MoRModel:
    return tiny_model(
        seed=2,
        vocab_size=tokenizer.vocab_size,
        thresholds=(0.0, -0.1, 0.05),
        relaxation_rank=4,
        eos_token_id=tokenizer.eos_id,
    )


@pytest.fixture(scope="module")
def exported(
    model: MoRModel, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    save(model, folder / "run", tokenizer)
    return hf_export.export(folder / "run", folder / "exported")


def test_without_mor_it_generates_the_same_tokens(
    exported: Path, model: MoRModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MOR, str(exported), str(tmp_path / "again"), TEXT[:40]],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ids = tokenizer.encode(TEXT[:40])
    (expected,) = generate(model, [ids], SamplingParams(max_tokens=24, ignore_eos=True))
    assert found["module"].startswith("transformers_modules")
    assert found["ids"] == ids
    assert found["tokens"] == found["again"] == expected.token_ids
    assert found["counts"] == expected.recursion_counts
    assert len(set(found["counts"])) > 1  # it routes
    assert found["tied"]
    assert torch.equal(load(tmp_path / "again").lm_head.weight, model.lm_head.weight)


def test_mor_reads_its_own_export(exported: Path, model: MoRModel) -> None:
    again = load(exported)
    assert again.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    assert json.loads((exported / "config.json").read_text())["num_hidden_layers"] == 8


def test_a_sharded_folder_is_read(exported: Path, model: MoRModel, tmp_path: Path) -> None:
    """As `save_pretrained` writes large models."""
    hf_model = MoRForCausalLM.from_pretrained(exported)
    hf_model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 2
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    again = load(tmp_path / "shards")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.lm_head.weight.data_ptr() == again.embed_tokens.weight.data_ptr()
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"lacks {files[1].name}, the file of"):
        load(tmp_path / "shards")


def test_the_card_says_how_to_load_it(exported: Path, model: MoRModel) -> None:
    text = (exported / "README.md").read_text()
    assert "library_name: transformers" in text
    assert f"| parameters | {cost.num_parameters(model.config):,} |" in text
    assert "trust_remote_code=True" in text


def test_the_auto_classes_know_our_models_after_import_mor_io_hf(
    exported: Path, model: MoRModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    known = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert type(known).__module__ == "mor.io.hf.auto_model"
    assert known.config.to_mor() == model.config
    known.save_pretrained(tmp_path / "again")
    for name in ("modeling_mor.py", "configuration_mor.py"):
        assert (tmp_path / "again" / name).read_text() == (exported / name).read_text()
    again = load(tmp_path / "again")
    assert again.config == model.config
    assert again.lm_head.weight is again.embed_tokens.weight
    plain = tmp_path / "plain"
    save(model, plain, tokenizer)  # without code files
    assert type(AutoModelForCausalLM.from_pretrained(plain)) is type(known)


def test_the_tokenizer_and_the_pipeline(exported: Path, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(exported)
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
    assert theirs.decode(tokenizer.encode(TEXT)) == TEXT
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eos_id
    assert theirs.padding_side == "left"
    assert set(theirs(TEXT)) == {"input_ids", "attention_mask"}  # what generate takes
    model = AutoModelForCausalLM.from_pretrained(exported)
    generator = pipeline("text-generation", model=model, tokenizer=theirs)
    texts = [TEXT[:30], TEXT[:9]]
    single = [generator(t, max_new_tokens=8, do_sample=False)[0]["generated_text"] for t in texts]
    both = generator(texts, max_new_tokens=8, do_sample=False, batch_size=2)
    assert [row[0]["generated_text"] for row in both] == single
    assert all(whole.startswith(start) for whole, start in zip(single, texts, strict=True))


@pytest.mark.parametrize("name", ["configuration_mor", "modeling_mor"])
def test_the_code_files_stand_alone(name: str) -> None:
    tree = ast.parse(hf_export.code(name))
    nodes = list(ast.walk(tree))
    modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    roots = {module.split(".")[0] for module in modules if module}
    assert roots <= {*sys.stdlib_module_names, "torch", "transformers", "configuration_mor"}
    defined = [
        *(n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)),
        *(t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets),
    ]
    assert len(defined) == len(set(defined))  # no file hides what another one defines


def test_an_export_in_another_precision(exported: Path, model: MoRModel, tmp_path: Path) -> None:
    folder = hf_export.export(exported, tmp_path / "out", dtype=torch.bfloat16)
    assert load(folder).embed_tokens.weight.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    narrow = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.arange(20)[None]
    wide = wrapped(model)(ids).logits
    assert float((narrow(ids).logits - wide).detach().abs().max()) < 0.5


def test_what_came_with_a_checkpoint_goes_with_it(
    exported: Path, model: MoRModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    save(model, source, tokenizer)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    folder = hf_export.export(source, tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [3, 4]
    chat = [{"role": "user", "content": TEXT}]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(chat, tokenize=False) == TEXT


def test_what_cannot_be_exported_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists: choose a new folder"):
        hf_export.export(exported, exported)
    with pytest.raises(CheckpointError, match="does not exist"):
        hf_export.export(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
