"""AdapterConfig: what peft's `adapter_config.json` says, or a refusal of what this package does not compute."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt_config.errors import CheckpointError, ConfigError
from gpt_config.lora_config import LoRAConfig

TASK_TYPES = ("CAUSAL_LM", "SEQ_CLS")

# What peft calls the fields of a LoRAConfig.
_LORA_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_rslora": "use_rslora",
}
# How the matrices began does not matter once they are learned, if the base model stayed as it was (pissa and others
# change it).
_HARMLESS_BEGINNINGS = (True, False, "gaussian", "orthogonal")
# Fields that change nothing of what a loaded GPT-2 computes. Conv1D's layout is known, whatever fan_in_fan_out says.
_NO_MATTER = {
    "auto_mapping", "fan_in_fan_out", "inference_mode", "layers_pattern", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter: its LoRA, the model it was learned on, and whether it continues texts or sorts them into classes."""

    lora: LoRAConfig
    base_model: str | None = None  # a folder, a shipped model or a hub name
    task_type: str = "CAUSAL_LM"  # or SEQ_CLS, a classifier: the weights of its head are in the adapter's file

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> AdapterConfig:
        """Read an `adapter_config.json`; CheckpointError names the file and what is wrong with it."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
            raise CheckpointError(f"{path} is not valid JSON ({error}): get the adapter again") from None
        try:
            return cls.from_dict(values)
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AdapterConfig:
        """Read the mapping of an `adapter_config.json`.

        Nothing is silently left out: a field that is in use and not computed here is a CheckpointError, and so is an
        unknown one that is neither null, false nor empty. ConfigError for a rank, rate or target that cannot be.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"an adapter's config must be a JSON object of fields, not {type(values).__name__}")
        if values.get("peft_type") != "LORA":
            raise CheckpointError(
                f"peft_type={values.get('peft_type')!r} is not 'LORA': no other adapters are computed here"
            )
        task_type = values.get("task_type") or "CAUSAL_LM"
        if task_type not in TASK_TYPES:
            raise CheckpointError(f"task_type={task_type!r} is not one of {', '.join(TASK_TYPES)}, which GPT-2 is used for")
        _check_computed(values, task_type)
        base = values.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise CheckpointError(f"base_model_name_or_path={base!r} must be the name or folder of a model")
        missing = [key for key in ("r", "lora_alpha", "target_modules") if values.get(key) is None]
        if missing:
            raise CheckpointError(f"{missing[0]} is missing: get the adapter again")
        known = {field: values[key] for field, key in _LORA_FIELDS.items() if values.get(key) is not None}
        return cls(lora=LoRAConfig(**known), base_model=base or None, task_type=task_type)

    def to_dict(self) -> dict[str, Any]:
        """The mapping of an `adapter_config.json` that peft reads as the same adapter."""
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
            "modules_to_save": ["score"] if self.task_type == "SEQ_CLS" else None,
            "fan_in_fan_out": True,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _check_computed(values: dict[str, Any], task_type: str) -> None:
    """CheckpointError for the first field that asks for another computation."""
    if values.get("bias", "none") != "none":
        raise CheckpointError(
            f"bias={values['bias']!r} is not supported: only adapters that leave biases alone are computed"
        )
    if values.get("init_lora_weights", True) not in _HARMLESS_BEGINNINGS:
        raise CheckpointError(
            f"init_lora_weights={values['init_lora_weights']!r} is not supported, for it changes the base model: "
            "let peft convert the adapter to plain LoRA"
        )
    if values.get("revision") not in (None, "main"):
        raise CheckpointError(
            f"revision={values['revision']!r} is not supported: put that revision of the base model into a folder, name it "
            "as base_model_name_or_path, and leave out revision"
        )
    saved = values.get("modules_to_save") or []
    heads = ["classifier", "score"] if task_type == "SEQ_CLS" else []  # what peft names for any kind of classifier
    if not isinstance(saved, list) or not all(name in heads for name in saved):
        raise CheckpointError(f"modules_to_save={saved!r} is not supported: only low-rank updates are computed here")
    understood = {*_LORA_FIELDS.values(), *_NO_MATTER, "peft_type", "task_type", "base_model_name_or_path", "bias"}
    understood |= {"init_lora_weights", "revision", "modules_to_save"}
    for key in sorted(values.keys() - understood):
        # An empty list or mapping, null and false ask for nothing; 0 may (a layer's number).
        if values[key] is not None and values[key] is not False and values[key] not in ([], {}, ""):
            raise CheckpointError(f"{key}={values[key]!r:.80} is not supported: this package computes plain LoRA only")
