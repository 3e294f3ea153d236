"""Names and heads: wrappers' names, heads beside the language model, untied flags; all readers take the same files."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import GPT2
from gpt2.reference import python_gpt2
from gpt2.reference.numpy_model import NumpyGPT2
from gpt_config import CheckpointError, GPT2Error, GPT2Warning, VocabularyError
from gpt_config.parameter_names import published_parameter
from gpt_encoder import load_tokenizer
from gpt_test.conftest import transformers_twin

IDS = torch.tensor([[1, 5, 2, 7]])
Tensors = dict[str, torch.Tensor]
LOADERS = (GPT2.from_pretrained, NumpyGPT2.from_pretrained, python_gpt2.load_model)


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_folder, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_loads(folder: Path, model: GPT2) -> None:
    expected = model.state_dict()
    loaded = GPT2.from_pretrained(folder).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    numpy_model = NumpyGPT2.from_pretrained(folder)
    assert all((numpy_model.parameters[name] == expected[name].numpy()).all() for name in expected)
    python_gpt2.load_model(folder)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"model.{name}", lambda name: f"model.transformer.{name}", lambda name: f"module.model.{name}",
        lambda name: f"_fsdp_wrapped_module.transformer.{name}", lambda name: f"_forward_module.{name}",
        lambda name: f"pretrained_model.transformer.{name}", lambda name: f"base_model.{name}",
        lambda name: re.sub(r"^(h\.\d+)\.", r"\1._orig_mod.", name),
        lambda name: "transformer." + re.sub(r"^(h\.\d+)\.", r"\1._checkpoint_wrapped_module._orig_mod.", name),
        lambda name: re.sub(r"\.(attn|mlp)\.", r".module.\1._checkpoint_wrapped_module.", name),
        lambda name: re.sub(r"\.(weight|bias)$", r"._orig_mod.\1", name),
    ],
)  # fmt: skip
def test_wrappers_anywhere_in_a_name(wrap: Callable[[str], str], folder: Path, small_model: GPT2) -> None:
    rewrite(folder, lambda tensors: {wrap(name): tensor for name, tensor in tensors.items()})
    assert_loads(folder, small_model)


def test_wrappers_that_torch_itself_makes(folder: Path, small_model: GPT2) -> None:
    """Each block wrapped by torch's activation checkpointing, and the whole by a data-parallel module."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    twin = transformers_twin(small_model)
    for number, block in enumerate(twin.transformer.h):
        twin.transformer.h[number] = CheckpointWrapper(block)
    wrapped = torch.nn.ModuleDict({"module": twin}).state_dict()
    assert any("module" in name for name in wrapped)
    (folder / "model.safetensors").unlink()
    torch.save(wrapped, folder / "pytorch_model.bin")
    loaded = GPT2.from_pretrained(folder)
    assert torch.allclose(loaded(IDS), transformers_twin(small_model)(IDS).logits, atol=1e-4)


def test_a_name_that_two_wrappers_give_is_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"model.ln_f.bias": tensors["ln_f.bias"].clone()})
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=r"'ln_f.bias' twice"):
            load(folder)


@pytest.mark.parametrize(
    "heads",
    [
        {"v_head.summary.weight": (1, 24), "v_head.summary.bias": (1,)}, {"multiple_choice_head.summary.weight": (1, 24)},
        {"v_head.0.weight": (48, 24), "v_head.2.weight": (1, 48)}, {"model.value_head.weight": (1, 24)},
    ],
)  # fmt: skip
def test_heads_beside_the_language_model_are_left_out(heads: dict, folder: Path, small_model: GPT2) -> None:
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(shape) for name, shape in heads.items()})
    name = re.sub("^model.", "", next(iter(heads))).split(".")[0]
    with pytest.warns(GPT2Warning, match=f"contains other heads, which a language model does not use: {name}$"):
        assert_loads(folder, small_model)


def test_transformers_model_with_two_heads_loads(small_model: GPT2, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    twin = transformers_twin(small_model)
    two = transformers.GPT2DoubleHeadsModel(twin.config).eval()
    two.transformer.load_state_dict(twin.transformer.state_dict())
    two.save_pretrained(tmp_path / "m")
    with pytest.warns(GPT2Warning, match="multiple_choice_head"):
        loaded = GPT2.from_pretrained(tmp_path / "m")
    assert torch.allclose(loaded(IDS), two(IDS).logits.view(1, 4, -1), atol=1e-4)


@pytest.mark.parametrize(
    "extra", ["h.0.crossattention.c_attn.weight", "lm_head.bias", "type_embeddings.weight", "qa_outputs.weight"]
)
def test_other_unknown_tensors_stay_refused(extra: str, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {extra: torch.ones(2, 2)})
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=re.escape(extra)):
            load(folder)


def test_an_untied_flag_with_equal_heads_is_the_same_model(folder: Path, small_model: GPT2) -> None:
    transformers = pytest.importorskip("transformers")
    twin = transformers_twin(small_model)
    twin.config.tie_word_embeddings = False
    twin.lm_head.weight = torch.nn.Parameter(twin.transformer.wte.weight.detach().clone())
    shutil.rmtree(folder)
    twin.save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert theirs.config.tie_word_embeddings is False
    assert_loads(folder, small_model)
    assert torch.allclose(GPT2.from_pretrained(folder)(IDS), theirs(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("flag", [True, False])
def test_unequal_heads_are_refused_whatever_the_flag_says(flag: bool, folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["wte.weight"] + 1e-3})
    set_config(folder, tie_word_embeddings=flag)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match=r"lm_head.weight that differs from wte.weight"):
            load(folder)


@pytest.mark.parametrize("kept", ["wte.weight", "lm_head.weight"])
def test_an_untied_flag_needs_both_tensors(kept: str, folder: Path) -> None:
    """transformers would draw the missing one at random."""

    def change(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "wte.weight"} | {kept: tensors["wte.weight"]}

    rewrite(folder, change)
    set_config(folder, tie_word_embeddings=False)
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="tie_word_embeddings=false"):
            load(folder)


def test_an_index_may_name_its_shards_with_a_dot(small_model: GPT2, tmp_path: Path) -> None:
    transformers_twin(small_model).save_pretrained(tmp_path, max_shard_size="40KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    loaded, expected = GPT2.from_pretrained(tmp_path).state_dict(), small_model.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    for bad in ("../model.safetensors", "a/../model.safetensors", 5):
        index["weight_map"]["transformer.wte.weight"] = bad
        path.write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"index\.json"):
            GPT2.from_pretrained(tmp_path)


def test_published_names_have_no_wrapper_in_them(small_model: GPT2) -> None:
    assert all(published_parameter(name) == name for name in small_model.state_dict())


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 548105171\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "generation_config.json"])
def test_a_git_lfs_pointer_is_named_as_one(name: str, folder: Path) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    for load in LOADERS if name != "pytorch_model.bin" else LOADERS[:1]:
        with pytest.raises(
            GPT2Error, match=f"{name} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
        ):
            load(folder)


def test_a_large_file_is_no_git_lfs_pointer(folder: Path) -> None:
    """A pointer has fewer than 1024 bytes."""
    (folder / "config.json").write_text(POINTER + " " * 1024)
    with pytest.raises(GPT2Error, match=r"config\.json is not valid JSON"):
        LOADERS[0](folder)


def test_a_git_lfs_pointer_in_place_of_a_tokenizer_or_an_index(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "char_vocab.json"):
        (tmp_path / name).mkdir()
        for other in ("vocab.json", "merges.txt") if name in ("vocab.json", "merges.txt") else ():
            (tmp_path / name / other).write_text("{}" if other == "vocab.json" else "")
        (tmp_path / name / name).write_text(POINTER)
        with pytest.raises(VocabularyError, match=f"{name} is a Git LFS pointer"):
            load_tokenizer(tmp_path / name)
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"index.json is a Git LFS pointer"):
        GPT2.from_pretrained(folder)


def test_a_larger_vocabulary_than_the_model_loads(folder: Path, small_model: GPT2) -> None:
    """Tokens were added without resizing the model; only a text that needs one of them is an error."""
    from gpt2 import complete
    from gpt2.weights.tokenizer import load_tokenizer_for
    from gpt_config import GPT2Config, InputError
    from gpt_test.conftest import random_model

    config = GPT2Config(**{**vars(small_model.config), "vocab_size": 298, "eos_token_id": None, "bos_token_id": 0})
    random_model(config).save_pretrained(folder, tokenizer=load_tokenizer(folder))
    model = GPT2.from_pretrained(folder)
    tokenizer = load_tokenizer_for(model)
    assert tokenizer.vocab_size == 300
    beyond = tokenizer.decode([298])
    needs = next(text for text in (beyond, f"the{beyond}", f" {beyond.strip()}") if 298 in tokenizer.encode(text))
    for options in ({}, {"num_beams": 2}, {"do_sample": True, "seed": 1}):
        made = complete(model, tokenizer, "a b", max_new_tokens=20, **options)[0]
        assert len(made.ids) == 20 and max(made.ids) < 298
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            InputError, match=re.escape(f"token id 298 ({beyond!r}) is outside the vocabulary of this model")
        ):
            complete(model, tokenizer, needs, max_new_tokens=3)
