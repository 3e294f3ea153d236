"""AdapterConfig: the content of peft's `adapter_config.json`. Settings that this package does not compute are errors.

It knows nothing of weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from gpt_config.errors import CheckpointError, ConfigError
from gpt_config.file_reading import read_json
from gpt_config.lfs import pointer_message
from gpt_config.lora_config import LoRAConfig

TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS")

# peft's names for the fields of LoRAConfig.
_LORA_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
}
# Initializations that leave the base model unchanged; "pissa" and others change it. The initial values of the matrices do
# not matter after training.
_HARMLESS_BEGINNINGS = (True, False, "gaussian", "orthogonal")
# Fields that do not affect what a loaded GPT-2 computes. fan_in_fan_out is among them because the layout of Conv1D is known.
_NO_MATTER = {
    "auto_mapping", "fan_in_fan_out", "inference_mode", "layers_pattern", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A LoRA adapter: its settings, the base model it was trained on, and its task (language model or classifier)."""

    lora: LoRAConfig
    base_model: str | None = None  # a folder, a shipped model or a hub name
    task_type: str = "CAUSAL_LM"  # or SEQ_CLS, a classifier: the adapter's file also contains the weights of its head

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> AdapterConfig:
        """The config in an `adapter_config.json`. Raises CheckpointError, which names the file and the problem."""
        try:
            values = read_json(path)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # not JSON, or not UTF-8
            message = pointer_message(path) or f"{path} is not valid JSON ({error}): download the adapter again"
            raise CheckpointError(message) from None
        try:
            return cls.from_dict(values)
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """The config in the mapping of an `adapter_config.json`. No setting is ignored silently.

        Raises CheckpointError for a setting that this package does not compute, and for an unknown field unless its value
        is null, false or empty. Raises ConfigError for an invalid rank, alpha, dropout or target.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"an adapter's config must be a JSON object of fields, not {type(values).__name__}")
        if values.get("peft_type") != "LORA":
            raise CheckpointError(
                f"peft_type={values.get('peft_type')!r} is not 'LORA': use a LoRA adapter, the only supported kind"
            )
        task_type = values.get("task_type") or "CAUSAL_LM"
        if task_type not in TASK_TYPES:
            raise CheckpointError(f"task_type={task_type!r} is not one of {', '.join(TASK_TYPES)}: use an adapter for these")
        _check_computed(values, task_type)
        base = values.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise CheckpointError(f"base_model_name_or_path={base!r} must be the name or folder of a model")
        missing = [key for key in ("r", "lora_alpha", "target_modules") if values.get(key) is None]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing: download the adapter again")
        known = {field: values[key] for field, key in _LORA_FIELDS.items() if values.get(key) is not None}
        known["layers_to_transform"] = _layers(values)
        known["modules_to_save"] = tuple(
            name for name in values.get("modules_to_save") or () if name not in _heads(task_type)
        )
        return cls(lora=LoRAConfig(**known), base_model=base or None, task_type=task_type)

    def to_dict(self) -> dict[str, Any]:
        """The mapping of an `adapter_config.json`, from which peft loads the same adapter."""
        lora = self.lora
        targets = lora.target_modules
        return {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "revision": None,
            "r": lora.rank,
            "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.use_rslora,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "modules_to_save": self._modules_to_save() or None,
            "layers_to_transform": list(lora.layers_to_transform) or None,
            "rank_pattern": dict(lora.rank_pattern),
            "alpha_pattern": dict(lora.alpha_pattern),
            "fan_in_fan_out": True,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }

    def _modules_to_save(self) -> list[str]:
        names = list(self.lora.modules_to_save)
        if self.task_type == "SEQ_CLS":
            return [*names, "score"]
        return [*names, "lm_head"] if self.lora.saves("transformer.wte") else names


def _heads(task_type: str) -> tuple[str, ...]:
    """The names of heads in modules_to_save. For a classifier, peft lists two that transformers' classifiers have."""
    return ("classifier", "score") if task_type == "SEQ_CLS" else ("lm_head",)


def _layers(values: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of the layers in layers_to_transform: a number, a list, or nothing for all layers."""
    numbers, pattern = values.get("layers_to_transform"), values.get("layers_pattern") or "h"
    if numbers is None or numbers == []:
        return ()
    if pattern != "h" and not (isinstance(pattern, list) and "h" in pattern):
        raise CheckpointError(f"layers_pattern={pattern!r:.80} is not the list of GPT-2's layers: it must be 'h'")
    return tuple(numbers) if isinstance(numbers, list) else (numbers,)


def _check_computed(values: dict[str, Any], task_type: str) -> None:
    """Raise CheckpointError for the first setting that this package does not compute."""
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f"bias={values['bias']!r} is not supported: use an adapter that does not train biases (bias='none')"
        )
    if values.get("init_lora_weights", True) not in _HARMLESS_BEGINNINGS:
        raise CheckpointError(
            f"init_lora_weights={values['init_lora_weights']!r} is not supported because it changes the base model: "
            "convert the adapter to plain LoRA with peft"
        )
    if values.get("revision") not in (None, "main"):
        raise CheckpointError(
            f"revision={values['revision']!r} is not supported: save that revision of the base model in a folder, set "
            "base_model_name_or_path to the folder, and remove revision"
        )
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise CheckpointError(f"modules_to_save={saved!r:.80} must be a list of names")
    understood = {*_LORA_FIELDS.values(), *_NO_MATTER, "peft_type", "task_type", "base_model_name_or_path", "bias"}
    understood |= {"init_lora_weights", "revision", "modules_to_save", "layers_to_transform", "ensure_weight_tying"}
    for key in sorted(values.keys() - understood):
        # Null, false and empty values set nothing. 0 may set something: the index of a layer.
        if values[key] is not None and values[key] is not False and values[key] not in ([], {}, ""):
            raise CheckpointError(f"{key}={values[key]!r:.80} is not supported: use an adapter with plain LoRA")
