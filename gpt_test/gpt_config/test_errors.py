"""ConfigError contains the invalid field, so that a program can show its own name for the field."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from gpt_config import AdapterConfig, ConfigError, FinetuningConfig, GPT2Config, LoRAConfig, TrainingConfig, WriteError
from gpt_config.errors import InputError, one_line


@pytest.mark.parametrize("kind", [ConfigError, InputError, WriteError])
def test_each_message_is_one_line_without_control_characters(kind: type[Exception]) -> None:
    """Also in the library. Names from files could move the cursor, colour the terminal or reverse the text."""
    message = str(kind("no tensor 'a\x1b[2J\x07\u202e' in\r\n  /tmp/a\u2028b:\u00a0use  another"))
    assert message == "no tensor 'a\\x1b[2J\\x07\\u202e' in /tmp/a b:\\xa0use  another"
    assert one_line("naïve 日本 \U0001f600") == "naïve 日本 \U0001f600"


def test_message_for_replaces_the_field_only_at_the_start() -> None:
    error = ConfigError("top_k=0 must be more than top_k=1", field="top_k")
    assert error.message_for("--top_k") == "--top_k=0 must be more than top_k=1"
    assert ConfigError("a/top_k: top_k=0", field="top_k").message_for("--top_k") == "a/top_k: top_k=0"
    assert ConfigError("top_k=0").message_for("--top_k") == "top_k=0" and ConfigError("x").field is None


def test_a_pickled_error_keeps_its_fields() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("a=1 and b=2", field="a", other_fields=("b",))))
    assert (str(error), error.field, error.other_fields) == ("a=1 and b=2", "a", ("b",))


@pytest.mark.parametrize("config", [GPT2Config, TrainingConfig, FinetuningConfig, LoRAConfig])
def test_the_error_for_each_field_names_that_field(config: type) -> None:
    """A list with an object is invalid in every field."""
    for field in dataclasses.fields(config):
        with pytest.raises(ConfigError) as caught:
            config(**{field.name: [object()]})
        assert caught.value.field == field.name
        assert caught.value.message_for("--an_option").startswith("--an_option=")


@pytest.mark.parametrize(
    ("make", "field", "other_fields"),
    [
        (lambda: GPT2Config(n_embd=10, n_head=3), "n_embd", ("n_head",)),
        (lambda: GPT2Config.from_dict({"model_type": "llama"}), "model_type", ()),
        (lambda: GPT2Config.from_dict({"pruned_heads": {"0": [1]}}), "pruned_heads", ()),
        (lambda: TrainingConfig(batch_size=10, accumulation=4), "batch_size", ("accumulation",)),
        (lambda: TrainingConfig(seed=1 << 63), "seed", ()),
        (lambda: TrainingConfig.from_dict({"lr": 1}), "lr", ()),
        (lambda: FinetuningConfig(validation_fraction=0.95), "validation_fraction", ("test_fraction",)),
        (lambda: FinetuningConfig(text_column="label"), "text_column", ("label_column",)),
        (lambda: FinetuningConfig(lora_rank=2, trainable="last_block"), "lora_rank", ("trainable",)),
        (lambda: LoRAConfig(rank=10**9), "rank", ()),
        (lambda: LoRAConfig(target_modules="("), "target_modules", ()),
        (
            lambda: AdapterConfig.from_dict({"peft_type": "LORA", "r": 0, "lora_alpha": 1, "target_modules": ["c_fc"]}),
            "rank",
            (),
        ),
    ],
)
def test_the_error_names_the_field_and_those_it_conflicts_with(make, field: str, other_fields: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert (caught.value.field, caught.value.other_fields) == (field, other_fields)
