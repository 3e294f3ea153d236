"""More of peft's settings: layers, patterns, modules saved as a whole, classifiers. The logits equal peft's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import GPT2
from gpt2.adapters.files import load_adapter, read_adapter, save_adapter
from gpt2.adapters.lora import add_lora, lora_parameters
from gpt2.finetuning.classifier_files import load_classifier
from gpt_config import CheckpointError, LoRAConfig
from gpt_test.conftest import transformers_twin
from gpt_test.gpt2.adapters.conftest import IDS, edit_config, fill


@pytest.fixture
def folder(small_folder: Path, tmp_path: Path) -> Path:
    """The folder of an adapter on every layer."""
    model = GPT2.from_pretrained(small_folder)
    add_lora(model, LoRAConfig(rank=3))
    fill(list(lora_parameters(model)))
    save_adapter(model, tmp_path / "adapter", base_model=small_folder)
    return tmp_path / "adapter"


PATTERNS = [
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "h"},
    {
        "rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 5},
        "alpha_pattern": {"^transformer.h.1.attn.c_attn": 3, "attn.c_.*": 9},
    },
    {"rank_pattern": {r"h\.[01]\.mlp\.c_fc": 1}, "use_rslora": True, "layers_to_transform": [0, 7]},
    {"modules_to_save": ["ln_f"]},
    {"modules_to_save": ["h.1.ln_1", "wpe", "transformer.ln_f"], "alpha_pattern": {"0.attn.c_attn": 0.5}},
]


@pytest.mark.parametrize("options", PATTERNS, ids=lambda options: "-".join(options))
def test_layers_patterns_and_modules_to_save_are_those_of_peft(
    options: dict, peft, small_model: GPT2, small_folder: Path, tmp_path: Path
) -> None:
    targets = ["c_attn", "c_fc"]
    their_config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True, **options)
    theirs = peft.get_peft_model(transformers_twin(small_model), their_config).eval()
    fill([parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT2.from_pretrained(small_folder)
    load_adapter(model, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", base_model_name_or_path=str(small_folder))
    merged = GPT2.from_pretrained(tmp_path / "theirs", dtype="float64")
    save_adapter(model, tmp_path / "ours", base_model=small_folder)
    again = peft.PeftModel.from_pretrained(transformers_twin(small_model), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert not torch.allclose(expected, small_model(IDS), atol=0.1)
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged(IDS), theirs.double()(IDS).logits, atol=1e-12, rtol=0)
    ours, his = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == his.keys() and all(torch.equal(ours[name], his[name]) for name in his)
    assert read_adapter(tmp_path / "ours").config.lora == read_adapter(tmp_path / "theirs").config.lora
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learns) == len(his)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_saved_token_embedding(task_type: str, peft, small_model: GPT2, small_folder: Path, tmp_path: Path) -> None:
    """A classifier has no head that is tied to it. For a language model, peft would untie the head, which is refused."""
    transformers = pytest.importorskip("transformers")
    kind = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}[task_type]
    base = getattr(transformers, kind).from_pretrained(small_folder, pad_token_id=0)
    their_config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type=task_type, modules_to_save=["wte"])
    theirs = peft.get_peft_model(base, their_config).eval()
    theirs.save_pretrained(tmp_path / "unchanged")
    fill([parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "trained")
    model = GPT2.from_pretrained(small_folder)
    if task_type == "CAUSAL_LM":
        with pytest.raises(CheckpointError, match="makes wte and lm_head differ"):
            load_adapter(model, tmp_path / "trained")
        load_adapter(model, tmp_path / "unchanged")
        assert torch.equal(model(IDS), small_model(IDS))
        with torch.no_grad():
            model.wte.weight.mul_(1.5)
        save_adapter(model, tmp_path / "ours", base_model=small_folder)
        again = peft.PeftModel.from_pretrained(transformers_twin(small_model), tmp_path / "ours").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits, model(IDS), atol=1e-5, rtol=0)
        assert torch.equal(GPT2.from_pretrained(tmp_path / "ours")(IDS), model(IDS))
    else:
        classifier = load_classifier(tmp_path / "trained")
        with torch.no_grad():
            torch.testing.assert_close(classifier(IDS + 1), theirs(IDS + 1).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base_is_classifier", [False, True])
def test_pefts_classifiers_load_without_our_own_file(
    base_is_classifier: bool, peft, small_folder: Path, tmp_path: Path
) -> None:
    """peft writes no labels. They are those of the base if it is a classifier, and otherwise numbered."""
    transformers = pytest.importorskip("transformers")
    kind, labels = transformers.AutoModelForSequenceClassification, ("sad", "glad", "odd")
    theirs = kind.from_pretrained(small_folder, num_labels=3, pad_token_id=0)
    if base_is_classifier:
        shutil.copytree(small_folder, tmp_path / "base")
        theirs.config.id2label = dict(enumerate(labels))
        theirs.config.problem_type = "multi_label_classification"
        theirs.save_pretrained(tmp_path / "base")
        theirs = kind.from_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(task_type="SEQ_CLS", r=4)).eval()
    fill([parameter for name, parameter in theirs.named_parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    classifier = load_classifier(tmp_path / "adapter")
    assert classifier.labels == (labels if base_is_classifier else ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert classifier.problem_type == ("multi_label_classification" if base_is_classifier else None)
    with torch.no_grad():
        torch.testing.assert_close(classifier(IDS + 1), theirs(IDS + 1).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_to_transform": [5]}, "'c_attn' matches no layer"),
        ({"layers_to_transform": [-1]}, "layers_to_transform=-1 must be a whole number"),
        ({"layers_to_transform": [True]}, "layers_to_transform=True must be a whole number"),
        ({"layers_to_transform": [0], "layers_pattern": ["layers"]}, r"layers_pattern=\['layers'\] is not the list"),
        ({"layers_to_transform": [0], "target_modules": ".*c_attn"}, "needs a list of target_modules"),
        ({"rank_pattern": {"c_attn": 0}}, "rank_pattern: c_attn=0 must be a whole number"),
        ({"rank_pattern": {"c_attn": 70000}}, "rank_pattern: c_attn=70000 must be at most"),
        ({"rank_pattern": {"c_(": 3}}, "rank_pattern=.* must map patterns"),
        ({"rank_pattern": [1]}, "rank_pattern=.* must map patterns"),
        ({"alpha_pattern": {"c_attn": "much"}}, "alpha_pattern: c_attn='much' must be a positive number"),
        ({"modules_to_save": ["ln_f"]}, "missing ln_f.bias, ln_f.weight"),
        ({"modules_to_save": [3]}, r"modules_to_save=\[3\] is not supported"),
        ({"modules_to_save": "ln_f"}, "modules_to_save='ln_f' must be a list"),
    ],
)
def test_wrong_patterns_are_one_line(changes: dict, message: str, folder: Path, small_folder: Path) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_adapter(GPT2.from_pretrained(small_folder), folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
