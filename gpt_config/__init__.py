"""Floor 0: what a GPT-2 is, how it generates and is trained, and every error a user can cause. Standard library only."""

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
