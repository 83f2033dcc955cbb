"""Llama checkpoints: the same function, the layers asked for, and damage that is named."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mor
from mor.errors import CheckpointError, ConfigError, MorError
from mor.io.llama import config_from_llama, convert_llama, from_llama, recursive_config
from mor.io.tokenizer import Tokenizer
from mor.model.sharing import source_layers

transformers = pytest.importorskip("transformers")

SHAPES = {
    "gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gqa_untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True, "head_dim": 10},
    "mha_untied": {"num_key_value_heads": 4, "tie_word_embeddings": False, "rope_theta": 5e4},
}
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
GENERATION = {"bos_token_id": 1, "eos_token_id": [96, 95], "temperature": 0.6, "top_p": 0.9}


def llama(num_hidden_layers: int = 6, **overrides: Any) -> Any:
    """A Llama of transformers with random weights, norms off their initial values."""
    torch.manual_seed(3)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    theta = overrides.pop("rope_theta", 1e4)
    rope = {"rope_type": "default", "rope_theta": theta}
    config = transformers.LlamaConfig(**{**shape, **overrides}, rope_parameters=rope)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama in four shards, with tokenizer and generation config."""
    folder = tmp_path_factory.mktemp("llama")
    llama(**SHAPES["gqa_untied"]).save_pretrained(folder, max_shard_size="60KB")
    (folder / "tokenizer.json").write_text(small_tokenizer())
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def small_tokenizer() -> str:
    """A tokenizer of 97 whole words."""
    import tokenizers
    from tokenizers import models

    return tokenizers.Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    ).to_str()


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


def whole(copy: Path) -> Path:
    """The same checkpoint as one file."""
    shards = sorted(copy.glob("model-*.safetensors"))
    assert len(shards) > 2
    state = {name: value for shard in shards for name, value in load_file(shard).items()}
    for shard in (*shards, copy / "model.safetensors.index.json"):
        shard.unlink()
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# The same function


@pytest.mark.parametrize("shape", SHAPES)
def test_vanilla_has_the_logits_of_transformers(tmp_path: Path, shape: str) -> None:
    theirs = llama(**SHAPES[shape])
    theirs.save_pretrained(tmp_path / "llama")
    ours = convert_llama(tmp_path / "llama", tmp_path / "ours")
    again = mor.load(tmp_path / "ours")
    with torch.no_grad():
        wanted = theirs(IDS).logits
        assert (ours(IDS).logits - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert torch.equal(ours(IDS).logits, again(IDS).logits)
    for model in (ours, again):
        tied = model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
        assert tied == SHAPES[shape]["tie_word_embeddings"]


@pytest.mark.parametrize("shape", SHAPES)
def test_engine_says_what_generate_says(tmp_path: Path, shape: str) -> None:
    theirs = llama(**SHAPES[shape])
    theirs.save_pretrained(tmp_path / "llama")
    prompts = [IDS[0, :7].tolist(), IDS[1, :20].tolist()]
    model = from_llama(tmp_path / "llama", dtype=torch.float64)
    engine = mor.LLM(model, mor.EngineConfig(kv_cache_memory_bytes=2**22))
    params = mor.SamplingParams(max_tokens=64, ignore_eos=True)
    for prompt, done in zip(prompts, engine.generate(prompts, params), strict=True):
        ids = torch.tensor([prompt])
        wanted = theirs.double().generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert done.token_ids == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded bin", "bfloat16"])
def test_all_file_forms_give_the_same_model(saved: Path, copy: Path, form: str) -> None:
    wanted = from_llama(saved)
    state = load_file(whole(copy) / "model.safetensors")
    if form != "safetensors":
        (copy / "model.safetensors").unlink()
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    state = {name: value.to(dtype) for name, value in state.items()}
    if form == "sharded bin":
        names = sorted(state)
        places = {name: f"pytorch_model-0000{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(places.values()):
            torch.save({n: state[n] for n in names if places[n] == file}, copy / file)
        index = {"metadata": {}, "weight_map": places}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif form != "safetensors":
        torch.save(state, copy / "pytorch_model.bin")
    model = from_llama(copy)
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(dtype)), name


def test_a_config_of_transformers_4_is_the_same() -> None:
    new = llama().config.to_dict()
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 1e4, "rope_scaling": None, "pad_token_id": -1, "eos_token_id": [5, 6]}
    config = config_from_llama(old)
    assert (config.rope_theta, config.pad_token_id, config.eos_token_id) == (1e4, None, 5)
    assert config_from_llama(new).rope_theta == 1e4


def test_tokenizer_chat_template_and_generation_config_come_along(
    saved: Path, tmp_path: Path
) -> None:
    convert_llama(saved, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (saved / name).read_bytes()
    assert Tokenizer.load(out).to_json() == Tokenizer.load(saved).to_json()
    assert json.loads((out / "generation_config.json").read_text()) == GENERATION
    mor.save(mor.load(out), tmp_path / "again", Tokenizer.load(out))
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"


# Recursive


@pytest.mark.parametrize("init", ["stepwise", "average", "lower", "upper", "random"])
@pytest.mark.parametrize("sharing", ["middle_cycle", "middle_sequence", "cycle", "sequence"])
def test_block_starts_from_the_layers_asked_for(
    saved: Path, tmp_path: Path, init: Any, sharing: str
) -> None:
    vanilla = from_llama(saved)
    convert_llama(
        saved, tmp_path / "out", num_recursions=2, init=init, sharing=sharing, routing="none"
    )
    model = mor.load(tmp_path / "out")
    config, ends = model.config, int(sharing.startswith("middle"))
    assert (config.num_prelude_layers, config.num_coda_layers) == (ends, ends)
    assert config.num_block_layers == (2 if ends else 3)
    drawn = source_layers(
        init,
        sharing=config.sharing,
        num_donor_layers=6,
        num_prelude_layers=ends,
        num_block_layers=config.num_block_layers,
        num_coda_layers=ends,
        num_recursions=2,
    )
    for layer, sources in zip(model.block, drawn, strict=True):
        for name, value in layer.named_parameters():
            from_donor = [dict(vanilla.block[i].named_parameters())[name] for i in sources]
            torch.testing.assert_close(value, torch.stack(from_donor).mean(0))
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()


@pytest.mark.parametrize("init", ["average", "stepwise"])
def test_relaxed_at_full_rank_has_the_logits_of_transformers(tmp_path: Path, init: Any) -> None:
    """1 + 2 * 2 + 1 layers: the block's are shared, and their LoRA pairs make them whole again."""
    theirs = llama(**SHAPES["gqa_tied"])
    theirs.save_pretrained(tmp_path / "llama")
    fields = {"num_recursions": 2, "routing": "none", "init": init}
    errors = []
    for rank in (32, 0):
        out = tmp_path / str(rank)
        convert_llama(tmp_path / "llama", out, relaxation_rank=rank, **fields)
        model = mor.load(out)
        assert model.config.num_block_layers == 2
        assert model.lm_head.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
        with torch.no_grad():
            wanted = theirs(IDS).logits
            errors.append(float((model(IDS).logits - wanted).abs().max() / wanted.abs().max()))
    assert errors[0] < 1e-4 < 0.1 < errors[1], errors


def test_mor_routes_and_its_routers_depend_on_the_seed(saved: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (from_llama(saved, num_recursions=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.config.routing == "expert_choice"
    assert first.config.twin_num_layers == 6
    name = "router.routers.1.proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_block_is_as_long_as_the_presets() -> None:
    donor = mor.MoRConfig.preset("135m", num_recursions=1)
    assert recursive_config(donor) == mor.MoRConfig.preset(
        "135m", num_recursions=3, num_key_value_heads=donor.num_key_value_heads
    )
    assert recursive_config(donor, "average").num_block_layers == 9  # 28 layers, each used once


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_recursions": 1, "routing": "none"}, "routing needs num_recursions >= 2"),
        ({"num_recursions": 9}, "num_block_layers"),
        ({"num_recursions": 0}, "num_recursions=0"),
        ({"num_recursions": 1, "relaxation_rank": 4}, "relaxation_rank needs num_recursions >= 2"),
        ({"num_recursions": 2, "relaxation_rank": 33}, "relaxation_rank=33 must be at most"),
        ({"num_recursions": 2, "num_prelude_layers": "x"}, "num_prelude_layers='x'"),
        ({"num_recursions": 2, "hidden_size": 16}, "hidden_size=16"),
        ({"num_recursions": 2, "num_blocks": 2}, "did you mean 'num_block_layers'"),
    ],
)
def test_fields_that_cannot_work_are_named(
    saved: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    if fields.get("num_recursions") == 9:
        fields = {**fields, "num_block_layers": 5}
    with pytest.raises(ConfigError, match=re.escape(message)):
        convert_llama(saved, tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE scaling 'linear'"),
        ({"num_attention_heads": 5}, "num_key_value_heads"),
        ({"num_hidden_layers": 7}, "'model.layers.6.input_layernorm.weight'"),
        ({"num_hidden_layers": 5}, "'model.layers.5.input_layernorm.weight'"),
        ({"vocab_size": 98}, "'model.embed_tokens.weight' has shape (97, 32)"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs"),
    ],
)
def test_what_we_would_compute_differently_is_refused(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit(copy / "config.json", **changes)
    check_refused(copy, message)


def check_refused(copy: Path, message: str) -> None:
    """Converting raises a CheckpointError that says so, and leaves nothing behind."""
    before = sorted(copy.parent.iterdir())
    for fields in ({}, {"num_recursions": 2}):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            convert_llama(copy, copy.parent / "out", **fields)
        assert sorted(copy.parent.iterdir()) == before


@pytest.mark.parametrize("change", ["missing", "renamed", "shape", "extra", "integers"])
def test_wrong_tensors_are_named(copy: Path, change: str) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    file = whole(copy) / "model.safetensors"
    state = load_file(file)
    value = state.pop(name)
    message = repr(name)
    if change == "renamed":
        state[name.replace("up_proj", "upper_proj")] = value
    elif change == "shape":
        state[name] = value[:-1].clone()
        message = f"{name!r} has shape (47, 32), its config.json asks for (48, 32)"
    elif change == "integers":
        state[name] = value.to(torch.int8)
    elif change == "extra":
        state |= {name: value, "model.layers.2.self_attn.q_proj.bias": torch.zeros(32)}
        message = "'model.layers.2.self_attn.q_proj.bias'"
    save_file(state, file)
    check_refused(copy, message)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named_and_its_tensor_where_one_can_tell(
    copy: Path, share: float
) -> None:
    file = whole(copy) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    check_refused(copy, "ends before the end of 'model." if share >= 0.5 else "model.safetensors")


def test_shards_that_are_missing_or_lack_a_tensor(copy: Path) -> None:
    first = sorted(copy.glob("model-*.safetensors"))[0]
    state = load_file(first)
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, first)
    check_refused(copy, f"{first.name} lacks {name!r}")
    first.unlink()
    check_refused(copy, f"lacks {first.name}")
    index = copy / "model.safetensors.index.json"
    edit(index, weight_map={name: f"../{first.name}"})
    check_refused(copy, "shards must lie beside it")
    edit(index, weight_map=[1])
    check_refused(copy, "weight_map")


class Runs:
    """Would run code when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1 + 1",)


@pytest.mark.parametrize("content", [Runs(), {"a": Runs()}, [1, 2], {"a": 1}, b"no pickle", b""])
def test_pickles_that_hold_more_than_tensors_are_refused(copy: Path, content: Any) -> None:
    (whole(copy) / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    check_refused(copy, "pytorch_model.bin")


def test_no_checkpoint_no_weights_and_a_taken_place(copy: Path, tmp_path: Path) -> None:
    check_refused(tmp_path / "nowhere", "is no checkpoint")
    with pytest.raises(MorError, match="exists"):
        convert_llama(copy, copy)
    for file in copy.glob("model*"):
        file.unlink()
    check_refused(copy, "holds no weights")
    (copy / "config.json").write_text("[1")
    check_refused(copy, "config.json cannot be read")
    (copy / "config.json").write_text("[1]")
    check_refused(copy, "must hold a JSON object")


def test_a_tokenizer_that_is_too_large_is_refused(copy: Path) -> None:
    Tokenizer.train(["text"], 300).save(copy)
    check_refused(copy, "the tokenizer has 260 entries, the model only 97")
