"""TrainingConfig: every invalid value is an error that names the field."""

from __future__ import annotations

import pytest

from gpt_config import ConfigError, TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("context", -1), ("max_steps", 1.5), ("accumulation", True), ("eval_interval", 0),
        ("checkpoint_interval", 0), ("log_interval", "1"), ("warmup_steps", -1), ("seed", None), ("sample_tokens", -1),
        ("learning_rate", -1.0), ("min_learning_rate", float("nan")), ("weight_decay", "0"), ("clip_norm", float("inf")),
        ("beta1", 1.0), ("beta2", -0.1), ("compile", 1), ("gradient_checkpointing", "no"), ("precision", "int8"),
        ("sharding", "zero"), ("sample_prompt", None),
    ],
)  # fmt: skip
def test_the_error_for_an_invalid_value_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        TrainingConfig(**{field: value})


def test_accumulation_must_divide_the_batch_size() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=10 .*accumulation=4"):
        TrainingConfig(batch_size=10, accumulation=4)


def test_to_dict_and_back() -> None:
    config = TrainingConfig(learning_rate=3e-4, compile=True)
    assert TrainingConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="lr is not a field"):
        TrainingConfig.from_dict({"lr": 1})
