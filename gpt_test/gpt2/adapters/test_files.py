"""Adapter files: peft loads ours and we load peft's, with the same logits. Other or damaged files are one-line errors."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.adapters.files import load_adapter, read_adapter, save_adapter
from gpt2.adapters.lora import add_lora, lora_modules, lora_parameters, named_lora_parameters
from gpt2.pretrained import load_merged
from gpt2.weights.folder import tokenizer_source
from gpt2.weights.tokenizer import load_tokenizer_for
from gpt_config import CheckpointError, GPT2Config, InputError, LoRAConfig, ModelNotFoundError, WriteError
from gpt_config.shipped import register_shipped_models
from gpt_test.conftest import random_model, transformers_twin
from gpt_test.gpt2.adapters.conftest import IDS, edit_config, fill
from gpt_test.gpt_config.test_locate import cache_repository

KINDS = [
    LoRAConfig(rank=4, alpha=6.5),
    LoRAConfig(rank=5, alpha=3, use_rslora=True, target_modules=("c_attn", "mlp.c_proj")),
    LoRAConfig(rank=1, target_modules=r".*\.h\.1\..*\.c_(attn|proj)", dropout=0.25),
]


@pytest.fixture
def adapted(small_folder: Path) -> GPT2:
    """The model of `small_folder`, with adapters on every layer that change its output a lot."""
    model = GPT2.from_pretrained(small_folder)
    add_lora(model, LoRAConfig(rank=3))
    fill(list(lora_parameters(model)))
    return model


@pytest.fixture
def folder(adapted: GPT2, small_folder: Path, tmp_path: Path) -> Path:
    save_adapter(adapted, tmp_path / "adapter", base_model=small_folder)
    return tmp_path / "adapter"


# -- peft -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", KINDS, ids=["plain", "rslora", "regex"])
def test_peft_loads_ours(lora: LoRAConfig, peft, small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(small_folder)
    add_lora(model, lora)
    fill(list(lora_parameters(model)))
    save_adapter(model, tmp_path, base_model=small_folder)
    twin = transformers_twin(small_model)
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), atol=1e-5, rtol=0)
        assert not torch.allclose(theirs(IDS).logits, small_model(IDS), atol=0.1)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (lora.rank, lora.alpha, lora.dropout)
    # The files that peft writes have the same tensors as ours, under the same names.
    theirs.save_pretrained(tmp_path / "again")
    ours, again = (load_file(place / "adapter_model.safetensors") for place in (tmp_path, tmp_path / "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("lora", [*KINDS, LoRAConfig(rank=2, target_modules="all-linear")], ids=lambda lora: str(lora.rank))
@pytest.mark.parametrize("safe", [True, False])
def test_we_load_pefts(lora, safe: bool, peft, small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    values = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.use_rslora}
    their_config = peft.LoraConfig(**values, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True)
    theirs = peft.get_peft_model(transformers_twin(small_model), their_config).eval()
    fill([parameter for name, parameter in theirs.named_parameters() if "lora_" in name])
    theirs.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}").exists()
    edit_config(tmp_path, base_model_name_or_path=str(small_folder))
    model = GPT2.from_pretrained(small_folder)
    load_adapter(model, tmp_path)
    merged = GPT2.from_pretrained(tmp_path, dtype="float64")  # in float32, the rounding of merged weights is visible
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert not torch.allclose(expected, small_model(IDS), atol=0.1)
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged(IDS), theirs.double()(IDS).logits, atol=1e-12, rtol=0)
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == set(lora_parameters(model))
    save_adapter(model, tmp_path / "again", base_model=small_folder)
    assert read_adapter(tmp_path / "again").config == read_adapter(tmp_path).config


def test_peft_and_we_load_adapters_of_classifiers(peft, small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    values = {
        key: value for key, value in small_model.config.to_dict().items() if key not in ("architectures", "model_type")
    }

    def their_classifier():
        twin = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**values, num_labels=3, pad_token_id=0))
        twin.transformer.load_state_dict(small_model.state_dict())
        return twin.eval()

    their_config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True)
    theirs = peft.get_peft_model(their_classifier(), their_config).eval()
    fill([parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    model, head = GPT2.from_pretrained(small_folder), torch.nn.Linear(24, 3, bias=False)
    assert read_adapter(tmp_path / "theirs").head["weight"].shape == (3, 24)
    load_adapter(model, tmp_path / "theirs", head=head)
    ids = IDS + 1  # transformers classifies by the last token that is not padding
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(head(model.hidden_states(ids)[:, -1]), expected, atol=1e-5, rtol=0)
    save_adapter(model, tmp_path / "ours", base_model=small_folder, head=head)
    again = peft.PeftModel.from_pretrained(their_classifier(), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(CheckpointError, match="belongs to a classifier, not to a language model"):
        GPT2.from_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"weight is \(3, 24\) instead of \(2, 24\)"):
        load_adapter(GPT2.from_pretrained(small_folder), tmp_path / "ours", head=torch.nn.Linear(24, 2, bias=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save="),
        ({"exclude_modules": ["h.0.attn.c_attn"]}, "exclude_modules="),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"target_modules": ["c_attn", "wte"]}, "wte.lora_embedding_A', which is not a LoRA matrix"),
    ],
)
def test_options_of_peft_that_we_do_not_support_are_refused(
    options: dict, message: str, peft, small_model: GPT2, tmp_path: Path
) -> None:
    their_config = peft.LoraConfig(**{"target_modules": ["c_attn"], "fan_in_fan_out": True, **options})
    peft.get_peft_model(transformers_twin(small_model), their_config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(random_model(small_model.config), tmp_path)
    assert "\n" not in str(caught.value)


# -- round trips ------------------------------------------------------------------------------------------------------------


def test_a_saved_adapter_loads_bit_for_bit(adapted: GPT2, folder: Path, small_folder: Path) -> None:
    names = {
        f"base_model.model.transformer.h.{i}.{layer}.lora_{m}.weight"
        for i in range(2) for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") for m in "AB"
    }  # fmt: skip
    assert load_file(folder / "adapter_model.safetensors").keys() == names
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = GPT2.from_pretrained(small_folder)
    load_adapter(model, folder)
    for (name, p), (other, q) in zip(named_lora_parameters(adapted), named_lora_parameters(model), strict=True):
        assert name == other and torch.equal(p, q)
    assert torch.equal(adapted(IDS), model(IDS))
    assert [module.config for _, module in lora_modules(model)] == [module.config for _, module in lora_modules(adapted)]


def test_a_language_models_adapter_has_no_head(folder: Path, small_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="belongs to a language model, not to a classifier"):
        load_adapter(GPT2.from_pretrained(small_folder), folder, head=torch.nn.Linear(24, 2, bias=False))


def test_target_modules_may_include_layers_of_other_models(folder: Path, small_folder: Path, adapted: GPT2) -> None:
    edit_config(folder, target_modules=["q_proj", "c_attn", "c_proj", "c_fc", "o_proj"])
    model = GPT2.from_pretrained(small_folder)
    load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted(IDS))


def test_adapters_of_a_model_without_head_load(folder: Path, small_folder: Path, adapted: GPT2) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("transformer.", ""): t.clone() for name, t in load_file(path).items()}, path)
    model = GPT2.from_pretrained(small_folder)
    load_adapter(model, folder)
    assert torch.equal(model(IDS), adapted(IDS))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_an_adapters_folder_loads_as_a_model_merged(dtype: str, folder: Path, adapted: GPT2, tmp_path: Path) -> None:
    model = GPT2.from_pretrained(folder, dtype=dtype)
    assert not model.training and not list(lora_modules(model)) and all(p.requires_grad for p in model.parameters())
    assert str(model.wte.weight.dtype) == f"torch.{dtype}"
    # The same weights as if the merged model had been saved and loaded.
    GPT2.from_pretrained(folder, dtype="float64" if dtype == "float64" else "float32").save_pretrained(tmp_path / "whole")
    whole = GPT2.from_pretrained(tmp_path / "whole", dtype=dtype)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    if dtype != "bfloat16":
        torch.testing.assert_close(model(IDS).float(), adapted(IDS), atol=1e-5, rtol=0)


def test_the_files_of_the_base_do_not_change(folder: Path, small_folder: Path) -> None:
    before = (small_folder / "model.safetensors").read_bytes()
    GPT2.from_pretrained(folder)
    assert (small_folder / "model.safetensors").read_bytes() == before


# -- the base model and the tokenizer ---------------------------------------------------------------------------------------


def test_a_relative_base_is_found_from_the_adapter_folder(
    folder: Path, small_folder: Path, adapted: GPT2, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(small_folder, tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit_config(folder, base_model_name_or_path="../base")
    torch.testing.assert_close(GPT2.from_pretrained(folder)(IDS), adapted(IDS), atol=1e-5, rtol=0)
    assert tokenizer_source(str(folder)) == str(folder / "../base")


def test_a_base_is_found_by_a_shipped_name(folder: Path, small_folder: Path, adapted: GPT2, tmp_path: Path) -> None:
    shutil.copytree(small_folder, tmp_path / "ships" / "tiny-one")
    register_shipped_models(str(tmp_path / "ships"))
    edit_config(folder, base_model_name_or_path="tiny-one")
    torch.testing.assert_close(GPT2.from_pretrained(folder)(IDS), adapted(IDS), atol=1e-5, rtol=0)
    shutil.rmtree(tmp_path / "ships")  # the folder stays registered, and other tests must not find the model


def test_adapter_and_base_may_both_be_on_the_hub(folder: Path, small_folder: Path, adapted: GPT2) -> None:
    import huggingface_hub.constants

    cache = huggingface_hub.constants.HF_HUB_CACHE
    edit_config(folder, base_model_name_or_path="someone/base")
    cache_repository(cache, "someone/base", small_folder)
    cache_repository(cache, "someone/adapter", folder)
    cache_repository(cache, "someone/half", folder, skip=("adapter_model.safetensors",))
    torch.testing.assert_close(GPT2.from_pretrained("someone/adapter")(IDS), adapted(IDS), atol=1e-5, rtol=0)
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached"):  # its weights are on the hub only
        GPT2.from_pretrained("someone/half")


def test_a_relative_base_is_stored_as_an_absolute_path(adapted, small_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(small_folder.parent)
    save_adapter(adapted, tmp_path, base_model=small_folder.name)
    assert read_adapter(tmp_path).config.base_model == str(small_folder)


def test_the_tokenizer_is_the_adapters_or_else_the_bases(folder, adapted, small_folder, small_tokenizer) -> None:
    model = GPT2.from_pretrained(folder)
    assert model.pretrained_from == small_folder and tokenizer_source(str(folder)) == str(small_folder)
    assert load_tokenizer_for(model).encode("the cat") == small_tokenizer.encode("the cat")
    save_adapter(adapted, folder, base_model=small_folder, tokenizer=small_tokenizer)
    assert GPT2.from_pretrained(folder).pretrained_from == folder and tokenizer_source(str(folder)) == str(folder)
    assert tokenizer_source(str(small_folder)) == str(small_folder)


@pytest.mark.parametrize("base", ["no/such/place", "no-such-name", "", "a" * 5000])
def test_a_missing_base_is_a_one_line_error(base: str, folder: Path) -> None:
    edit_config(folder, base_model_name_or_path=base)
    with pytest.raises(CheckpointError) as caught:
        GPT2.from_pretrained(folder)
    assert str(folder) in str(caught.value) and base in str(caught.value) and "\n" not in str(caught.value)
    assert not base or (isinstance(caught.value, ModelNotFoundError) and "needs the model" in str(caught.value))


def test_a_base_that_is_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "second")
    edit_config(tmp_path / "second", base_model_name_or_path=str(folder))
    with pytest.raises(CheckpointError, match="which is an adapter too"):
        GPT2.from_pretrained(tmp_path / "second")
    with pytest.raises(CheckpointError, match="contains an adapter, but a whole model is needed"):
        load_merged(tmp_path / "second", folder)


@pytest.mark.parametrize("sizes", [{"n_embd": 12, "n_layer": 2}, {"n_embd": 24, "n_layer": 1}, {"n_embd": 24, "n_layer": 3}])
def test_a_base_of_other_shapes_is_a_one_line_error(sizes: dict, folder: Path, tmp_path: Path) -> None:
    random_model(GPT2Config(vocab_size=300, n_head=3, **sizes)).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        load_merged(folder, tmp_path / "other")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_a_folder_with_model_and_adapter_is_refused(folder: Path, small_folder: Path, adapted: GPT2, tmp_path: Path) -> None:
    both = Path(shutil.copytree(small_folder, tmp_path / "both"))
    with pytest.raises(WriteError, match="contains a model: write the adapter into another folder"):
        save_adapter(adapted, both, base_model=small_folder)
    shutil.copytree(folder, both, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="contains a model and an adapter"):
        GPT2.from_pretrained(both)


def test_a_model_without_adapters_is_not_saved_as_an_adapter(small_model: GPT2, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapters of 0 kinds"):
        save_adapter(small_model, tmp_path, base_model="gpt2")
    assert not list(tmp_path.iterdir())


# -- damaged files -------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors or adapter_model.bin"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 90), "is not a readable safetensors file"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 3000), "is not a readable safetensors file"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
        (lambda f: edit_config(f, r=4), r"c_attn.lora_A is \(3, 24\) instead of \(4, 24\)"),
        (lambda f: edit_config(f, target_modules=["c_attn"]), "unknown h.0.attn.c_proj.lora_A"),
        (lambda f: edit_config(f, target_modules=["q_proj"]), "'q_proj' matches no layer"),
        (lambda f: edit_config(f, peft_type="PROMPT_TUNING"), "peft_type='PROMPT_TUNING'"),
        (lambda f: rewrite(f, lambda t: t.pop(FIRST)), "missing h.0.attn.c_attn.lora_A"),
        (lambda f: rewrite(f, lambda t: t.update({FIRST: t[FIRST].t().contiguous()})), r"is \(24, 3\) instead of \(3, 24\)"),
        (lambda f: rewrite(f, lambda t: t.update({FIRST: t[FIRST].long()})), "is torch.int64"),
        (lambda f: rewrite(f, lambda t: t.update({"x": torch.ones(1)})), "contains 'x', which is not a LoRA matrix"),
        (
            lambda f: rewrite(f, lambda t: t.update({FIRST.replace("transformer.", ""): t[FIRST].clone()})),
            "a second one for its layer",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 24)})),
            "score.weight', which is not a LoRA matrix",
        ),
    ],
)
def test_damage_is_named_and_the_model_is_unchanged(
    damage, message: str, folder: Path, small_model, small_folder: Path
) -> None:
    damage(folder)
    model = GPT2.from_pretrained(small_folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(model, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(lora_modules(model)) and torch.equal(model(IDS), small_model(IDS))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(CheckpointError, match=message):
        GPT2.from_pretrained(folder)


def test_rslora_is_not_lora(folder: Path) -> None:
    """The weights differ, so the comparisons with peft above would detect a confusion of the two."""
    plain = GPT2.from_pretrained(folder)
    edit_config(folder, use_rslora=True)
    other = GPT2.from_pretrained(folder)
    base = GPT2.from_pretrained(read_adapter(folder).config.base_model or "")
    p, q, w = (model.h[0].attn.c_attn.weight for model in (plain, other, base))
    torch.testing.assert_close((q - w), (p - w) * math.sqrt(3), atol=1e-6, rtol=1e-4)
