"""A number of NumPy has the same effect in a config as Python's number of the same value, and is stored as the latter."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_config import AdapterConfig, ConfigError, FinetuningConfig, GenerationConfig, GPT2Config, LoRAConfig, TrainingConfig
from gpt_config.validation import check_bool, check_real, check_seed, check_whole, plain_number, plain_numbers

CONFIGS = [
    GPT2Config,
    TrainingConfig,
    FinetuningConfig,
    LoRAConfig,
    GenerationConfig,
]
INTEGERS = (np.int8, np.uint8, np.int32, np.int64, np.uint64)
FLOATS = (np.float16, np.float32, np.float64, np.longdouble)


def outcome(config: type, field: str, value: object) -> tuple[object, ...]:
    try:
        made = config(**{field: value})
    except ConfigError as error:
        return ("refused", str(error), error.field)
    return ("taken", {name: (type(stored), repr(stored)) for name, stored in dataclasses.asdict(made).items()})


@pytest.mark.parametrize("config", CONFIGS)
@given(data=st.data())
def test_numpy_and_python_numbers_have_the_same_effect(config: type, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([field.name for field in dataclasses.fields(config)]))
    kind = data.draw(st.sampled_from((*INTEGERS, *FLOATS, np.bool_)))
    number: Any = kind(data.draw(st.booleans() if kind is np.bool_ else st.integers(0, 100).map(lambda n: n / 4)))
    python = bool(number) if kind is np.bool_ else int(number) if kind in INTEGERS else float(number)
    for given_number in (number, np.array(number)):
        assert outcome(config, field, given_number) == outcome(config, field, python)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_layer=np.int64(3), attn_pdrop=np.float32(0.5), scale_attn_weights=np.bool_(False)),
        TrainingConfig(batch_size=np.int32(8), learning_rate=np.float64(0.5), compile=np.True_, seed=np.uint64(7)),
        FinetuningConfig(epochs=np.float32(1.5), balance=np.False_, lora_rank=np.array(4)),
        LoRAConfig(rank=np.int16(4), alpha=np.float16(2.5), use_rslora=np.True_),
        AdapterConfig.from_dict({
            "peft_type": "LORA", "r": np.int64(4), "lora_alpha": np.float32(8), "target_modules": ["c_attn"],
        }),
    ],
)  # fmt: skip
def test_stored_numbers_can_be_written_as_json(config: Any) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(config)))
    assert hash(config) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", np.True_), ("n_layer", np.float32(3)), ("n_layer", np.int64(0)), ("attn_pdrop", np.True_),
        ("attn_pdrop", np.float32("nan")), ("attn_pdrop", np.complex64(0)), ("scale_attn_weights", np.int64(1)),
        ("scale_attn_weights", np.float64(1)), ("n_layer", np.array([3])), ("n_layer", np.timedelta64(3, "s")),
        ("n_layer", Fraction(3)), ("initializer_range", Fraction(10**400)), ("n_layer", np.str_("3")),
    ],
)  # fmt: skip
def test_a_number_of_the_wrong_kind_is_an_error(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}=") as caught:
        GPT2Config(**{field: value})
    assert caught.value.field == field


def test_each_check_accepts_numpy_numbers() -> None:
    check_whole("n", np.int64(3), 1)
    check_real("x", np.float32(0.5), lambda value: type(value) is float, "a float")
    check_bool("b", np.False_)
    check_seed(np.uint64(1))
    with pytest.raises(ConfigError, match=r"seed=9223372036854775808 must be below 2\*\*63"):
        check_seed(np.uint64(1 << 63))


def test_plain_numbers_converts_tuples_and_leaves_other_values() -> None:
    @dataclasses.dataclass(frozen=True)
    class Config:
        sizes: tuple[int, ...]
        other: object

        def __post_init__(self) -> None:
            plain_numbers(self)

    other = [np.int64(1)]
    config = Config((np.int64(1), 2), other)
    assert config.sizes == (1, 2) and type(config.sizes[0]) is int and config.other is other
    assert plain_number(Fraction(1, 2)) == 0.5 and plain_number(None) is None
