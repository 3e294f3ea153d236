"""Folders as transformers and peft write them: the same logits, also after load and save."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2 import GPT2
from gpt2.finetuning.classifier_files import load_classifier, save_classifier
from gpt_encoder import GPT2Tokenizer
from gpt_test.gpt2.weights.layouts import edit, model, randomized, transformers

peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[test]')")

IDS = torch.tensor([[1, 5, 2, 7, 3], [4, 4, 9, 6, 2]])

# -- weights and configs ------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], dict[str, Any]]


def saved(folder: Path, *, shards: str = "", dtype: torch.dtype | None = None, **changes: Any) -> None:
    theirs = model(**changes)
    theirs = theirs if dtype is None else theirs.to(dtype)
    theirs.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))


def bin_file(folder: Path, change: Change = dict, *, old: bool = False, **changes: Any) -> None:
    """pytorch_model.bin, which transformers no longer writes."""
    theirs = model(**changes)
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(change(theirs.state_dict()), folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)


def bin_shards(folder: Path) -> None:
    from huggingface_hub import save_torch_state_dict

    theirs = model()
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(theirs.state_dict(), folder, max_shard_size="20KB", safe_serialization=False)


def renamed(pattern: Callable[[str], str]) -> Change:
    return lambda state: {pattern(name): tensor for name, tensor in state.items()}


def in_blocks(wrapper: str) -> Callable[[str], str]:
    return lambda name: ".".join(part + (f".{wrapper}" if part.isdigit() else "") for part in name.split("."))


def with_masks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(40, 40).tril()[None, None].bool() for layer in range(2)}
    return {**state, **masks, **{f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}}


def other_heads(folder: Path) -> None:
    model("GPT2DoubleHeadsModel").save_pretrained(folder)


def value_head(folder: Path) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 24), "v_head.summary.bias": torch.ones(1)}
    bin_file(folder, lambda state: {f"pretrained_model.{name}": tensor for name, tensor in state.items()} | head)


def resized(folder: Path, n_rows: int, multiple: int | None = None) -> None:
    theirs = model()
    theirs.resize_token_embeddings(n_rows, pad_to_multiple_of=multiple)
    randomized(theirs).save_pretrained(folder)


def untied(folder: Path) -> None:
    theirs = model(tie_word_embeddings=False)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.transformer.wte.weight)
    theirs.save_pretrained(folder)


def other_names(folder: Path) -> None:
    saved(folder)
    values = json.loads((folder / "config.json").read_text())
    new = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
           "n_head": "num_attention_heads"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({new.get(key, key): value for key, value in values.items()}))


def index_with_dots(folder: Path) -> None:
    saved(folder, shards="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(path, weight_map={name: f"./{file}" for name, file in index["weight_map"].items()})


def merged_adapter(folder: Path) -> None:
    adapted(model(), {}).merge_and_unload().save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    "safetensors": saved,
    "shards": lambda folder: saved(folder, shards="20KB"),
    "shards named with ./": index_with_dots,
    "float16": lambda folder: saved(folder, dtype=torch.float16),
    "bfloat16": lambda folder: saved(folder, dtype=torch.bfloat16),
    "float64 in shards": lambda folder: saved(folder, dtype=torch.float64, shards="20KB"),
    "without a head": lambda folder: saved(folder, kind="GPT2Model"),
    "n_inner": lambda folder: saved(folder, n_inner=70),
    "exact gelu": lambda folder: saved(folder, activation_function="gelu"),
    "relu": lambda folder: saved(folder, activation_function="relu"),
    "tanh by another name": lambda folder: saved(folder, activation_function="gelu_pytorch_tanh"),
    "unscaled scores": lambda folder: saved(folder, scale_attn_weights=False),
    "scores by layer": lambda folder: saved(folder, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "epsilon": lambda folder: saved(folder, layer_norm_epsilon=0.03),
    "one head, one layer": lambda folder: saved(folder, n_head=1, n_layer=1, n_positions=7),
    "end tokens": lambda folder: saved(folder, eos_token_id=[299, 3], pad_token_id=0),
    "no end token": lambda folder: saved(folder, eos_token_id=None, bos_token_id=None),
    "an untied equal head": untied,
    "general names of sizes": other_names,
    "more rows": lambda folder: resized(folder, 307),
    "padded rows": lambda folder: resized(folder, 302, 64),
    "fewer rows": lambda folder: resized(folder, 290),
    "bin": bin_file,
    "bin before 2020": lambda folder: bin_file(folder, old=True),
    "bin in shards": bin_shards,
    "bin with masks": lambda folder: bin_file(folder, with_masks),
    "compiled": lambda folder: bin_file(folder, renamed(lambda name: f"_orig_mod.{name}")),
    "data-parallel": lambda folder: bin_file(folder, renamed(lambda name: f"module.{name}")),
    "Lightning": lambda folder: bin_file(folder, renamed(lambda name: f"model.{name}")),
    "checkpointed blocks": lambda folder: bin_file(folder, renamed(in_blocks("_checkpoint_wrapped_module"))),
    "compiled blocks": lambda folder: bin_file(folder, renamed(in_blocks("_orig_mod"))),
    "two heads": other_heads,
    "a value head": value_head,
    "a merged adapter": merged_adapter,
}
# transformers itself does not remove wrappers' names, so these are compared with the model that was wrapped.
WRAPPED = ("compiled", "data-parallel", "Lightning", "checkpointed blocks", "compiled blocks", "a value head")


def logits_of(theirs: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return theirs(ids).logits.float()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05
    torch.testing.assert_close(found.float(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    MODELS[name](tmp_path / "m")
    read = transformers.AutoModelForCausalLM.from_pretrained
    expected = logits_of(model() if name in WRAPPED else read(tmp_path / "m", dtype=torch.float32).eval())
    ours = GPT2.from_pretrained(tmp_path / "m")
    assert_close(ours(IDS), expected)
    ours.save_pretrained(tmp_path / "again")
    assert_close(logits_of(read(tmp_path / "again").eval()), expected)
    before, after = (transformers.AutoConfig.from_pretrained(tmp_path / place) for place in ("m", "again"))
    if name != "fewer rows":  # whose end token has no row
        assert after.eos_token_id == before.eos_token_id and after.bos_token_id == before.bos_token_id


@pytest.fixture
def folder(small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> Path:
    small_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "m"


# -- classifiers -------------------------------------------------------------------------------------------------------

CLASSIFIERS: dict[str, dict[str, Any]] = {
    "two labels": {"num_labels": 2},
    "named labels": {"id2label": {0: "sad", 1: "glad", 2: "odd"}, "problem_type": "single_label_classification"},
    "several labels at once": {"num_labels": 4, "problem_type": "multi_label_classification"},
    "one label": {"num_labels": 1},
    "a number": {"num_labels": 1, "problem_type": "regression"},
    "several numbers": {"num_labels": 3, "problem_type": "regression"},
    "padded rows": {"num_labels": 3, "vocab_size": 320},
    "in 16 bits": {"num_labels": 3, "dtype": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_score_as_transformers(name: str, folder: Path, small_tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    options = dict(CLASSIFIERS[name])
    dtype = options.pop("dtype", torch.float32)
    theirs = model("GPT2ForSequenceClassification", pad_token_id=299, **options)
    theirs.to(dtype).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = read(folder, dtype=torch.float32).eval()
    ours = load_classifier(folder)
    assert list(ours.labels) == list(theirs.config.id2label.values())
    assert_close(ours(IDS), logits_of(theirs))
    save_classifier(ours, tmp_path / "again", small_tokenizer)
    assert_close(logits_of(read(tmp_path / "again").eval()), logits_of(theirs))
    pipeline = transformers.pipeline(
        "text-classification", model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), device="cpu"
    )
    expected = {score["label"]: score["score"] for score in pipeline("the cat sat", top_k=None)}
    found = ours.scores(ours(small_tokenizer.encode("the cat sat", return_tensors="pt")))[0]
    assert dict(zip(ours.labels, found.tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)


# -- adapters ------------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "default targets": {},
    "all layers": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "all-linear": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*\.h\.1\..*c_(attn|fc)"},
    "rslora": {"use_rslora": True, "r": 5},
    "one layer": {"layers_to_transform": [1]},
    "patterns": {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 5}, "alpha_pattern": {r"h\.0\..*": 3}},
    "a saved norm": {"modules_to_save": ["ln_f"]},
    "a gaussian beginning": {"init_lora_weights": "gaussian", "lora_dropout": 0.2},
    "a tied saved head": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


def adapted(theirs: Any, options: dict[str, Any], task_type: str = "CAUSAL_LM") -> Any:
    """`theirs` with an adapter of peft, whose parameters are random."""
    with warnings.catch_warnings(action="ignore"):
        made = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "task_type": task_type, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft(name: str, folder: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "whole")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    theirs = adapted(base, ADAPTERS[name])
    theirs.save_pretrained(folder)
    assert_close(GPT2.from_pretrained(folder)(IDS), logits_of(theirs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_rows", [300, 304])
def test_an_adapter_with_the_embeddings_of_its_base(n_rows: int, folder: Path, tmp_path: Path) -> None:
    """peft adds them by itself if the vocabulary has grown. Here the base gets the new rows when the adapter is loaded."""
    model().save_pretrained(tmp_path / "whole")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base.resize_token_embeddings(n_rows)
    theirs = adapted(randomized(base), {})
    theirs.save_pretrained(folder, save_embedding_layers=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base.resize_token_embeddings(n_rows)  # peft refuses the adapter without it
    assert_close(GPT2.from_pretrained(folder)(IDS), logits_of(peft.PeftModel.from_pretrained(base, folder).eval()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["default targets", "patterns", "a saved norm"])
def test_adapters_of_classifiers(name: str, folder: Path, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "whole")
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = adapted(read(tmp_path / "whole", num_labels=3, pad_token_id=299), ADAPTERS[name], "SEQ_CLS")
    theirs.save_pretrained(folder)
    assert_close(load_classifier(folder)(IDS), logits_of(theirs))
