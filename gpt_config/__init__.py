"""Floor 0: what a GPT-2 is, how it generates, and every error a user can cause. Standard library only."""

from gpt_config.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    GPT2Error,
    GPT2Warning,
    InputError,
    InputTypeError,
    ModelNotFoundError,
    VocabularyError,
    WriteError,
)
from gpt_config.generation_config import GenerationConfig
from gpt_config.model_config import PRESETS, GPT2Config

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "GPT2Config",
    "GPT2Error",
    "GPT2Warning",
    "GenerationConfig",
    "InputError",
    "InputTypeError",
    "ModelNotFoundError",
    "VocabularyError",
    "WriteError",
]
