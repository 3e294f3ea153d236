"""Configurations of the model, of generation and of training, and all exceptions. Floor 1: standard library only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_config.adapter_config import AdapterConfig
    from gpt_config.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DeviceError,
        GPT2Error,
        GPT2Warning,
        InputError,
        InputTypeError,
        ModelNotFoundError,
        Remedy,
        TrainingError,
        VocabularyError,
        WriteError,
    )
    from gpt_config.finetuning_config import FinetuningConfig
    from gpt_config.generation_config import GenerationConfig
    from gpt_config.lora_config import LoRAConfig
    from gpt_config.model_config import PRESETS, GPT2Config
    from gpt_config.training_config import TrainingConfig

# The module of each public name; all other names are in gpt_config.errors.
_HOME = {
    "AdapterConfig": "gpt_config.adapter_config",
    "FinetuningConfig": "gpt_config.finetuning_config",
    "GenerationConfig": "gpt_config.generation_config",
    "LoRAConfig": "gpt_config.lora_config",
    "PRESETS": "gpt_config.model_config",
    "GPT2Config": "gpt_config.model_config",
    "TrainingConfig": "gpt_config.training_config",
}

__all__ = [
    "PRESETS",
    "AdapterConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "FinetuningConfig",
    "GPT2Config",
    "GPT2Error",
    "GPT2Warning",
    "GenerationConfig",
    "InputError",
    "InputTypeError",
    "LoRAConfig",
    "ModelNotFoundError",
    "Remedy",
    "TrainingConfig",
    "TrainingError",
    "VocabularyError",
    "WriteError",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562). `import gpt2` needs none of them and must be fast."""
    if name not in __all__:
        raise AttributeError(f"module 'gpt_config' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME.get(name, "gpt_config.errors")), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
