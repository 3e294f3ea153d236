"""TrainingConfig: every invalid value is an error that names the field."""

from __future__ import annotations

import pytest

from gpt_config import ConfigError, FinetuningConfig, TrainingConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("context", -1), ("max_steps", 1.5), ("accumulation", True), ("eval_interval", 0),
        ("checkpoint_interval", 0), ("log_interval", "1"), ("warmup_steps", -1), ("seed", None), ("sample_tokens", -1),
        ("learning_rate", -1.0), ("min_learning_rate", float("nan")), ("weight_decay", "0"), ("clip_norm", float("inf")),
        ("beta1", 1.0), ("beta2", -0.1), ("compile", 1), ("gradient_checkpointing", "no"), ("precision", "int8"),
        ("sharding", "zero"), ("sample_prompt", None), ("schedule", "step"), ("decay_shape", "exp"), ("decay_steps", -1),
        ("optimizer", "sgd"), ("momentum", 1.0), ("ema", 1), ("ema", -0.1),
        ("min_learning_rate_share", 1.5), ("min_learning_rate_share", float("nan")),
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


def test_defaults_follow_from_other_settings() -> None:
    config = TrainingConfig(learning_rate=5e-5)
    assert config.lowest_rate == 5e-6 and TrainingConfig(learning_rate=5e-5, min_learning_rate=0).lowest_rate == 0
    assert TrainingConfig(learning_rate=5e-5, min_learning_rate_share=0.5).lowest_rate == 2.5e-5
    assert [TrainingConfig(max_steps=n).n_warmup for n in (1, 60, 2000, 9000)] == [0, 3, 100, 100]
    assert TrainingConfig(max_steps=9, warmup_steps=9).n_warmup == 9


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 5e-5, "min_learning_rate": 1e-4},
        {"max_steps": 9, "warmup_steps": 10},
        {"max_steps": 10**8},
        {"batch_size": 10**13},
        {"sample_tokens": 10**6},
        {"keep": "worst"},
        {"min_learning_rate": 1e-4, "min_learning_rate_share": 0.1},
        {"schedule": "wsd", "max_steps": 9, "warmup_steps": 5, "decay_steps": 5},
    ],
)
def test_contradictions_and_absurd_sizes_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError) as error:
        TrainingConfig(**fields)
    assert error.value.field in fields


@pytest.mark.parametrize(
    ("n_rows", "n_processes", "accumulation", "expected"),
    [(9, 1, 1, 9), (9, 2, 1, 8), (9, 2, 2, 8), (3, 4, 1, 4), (100, 2, 1, 16), (9, 3, 1, 9)],
)
def test_few_rows_are_shared_evenly(n_rows: int, n_processes: int, accumulation: int, expected: int) -> None:
    config = FinetuningConfig(accumulation=accumulation)
    training = config.training_config(n_rows=n_rows, context=8, n_processes=n_processes)
    assert training.batch_size == expected and training.batch_size % (n_processes * accumulation) == 0
