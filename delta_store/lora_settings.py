"""A LoRA adapter's settings: every one is used, without effect on the weights, or refused by name."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.delta_store.errors import CheckpointError, UnsupportedCheckpoint

USED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",  # the file then holds both of a tied pair
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",  # the base's layers say it; PEFT too corrects a wrong one
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base's weights as they are; PiSSA, OLoRA and their like take something out of them."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What adapter_config.json says about the scale of the products and about what else is in the file."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rank_stabilised: bool
    dora: bool
    modules_to_save: tuple[str, ...]

    def scale(self, module: str, rank: int) -> float:
        """The factor of ``b @ a`` for the module at this path, whose ``a`` has ``rank`` rows.

        Raises CheckpointError where the settings announce another rank: the scale would be another too.
        """
        announced = self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)
        if announced != rank:
            raise CheckpointError(f"{module}: adapter_config.json says rank {announced}, the file holds rank {rank}")
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)
        return alpha / rank**0.5 if self.rank_stabilised else alpha / rank


def read_settings(folder: Path) -> LoraSettings:
    """Read ``folder/adapter_config.json``; UnsupportedCheckpoint names the settings that cannot be honoured."""
    path = folder / "adapter_config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        _refuse(settings, path)
        return LoraSettings(
            rank=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            rank_pattern=settings.get("rank_pattern") or {},
            alpha_pattern=settings.get("alpha_pattern") or {},
            rank_stabilised=bool(settings.get("use_rslora")),
            dora=bool(settings.get("use_dora")),
            modules_to_save=tuple(settings.get("modules_to_save") or ()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the configuration of a LoRA adapter: {error!r}") from error


def _refuse(settings: dict[str, Any], path: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise UnsupportedCheckpoint(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA is supported")
    if settings.get("init_lora_weights", True) not in KEEPS_THE_BASE:
        raise UnsupportedCheckpoint(
            f"{path}: init_lora_weights {settings['init_lora_weights']!r} changes the base's weights; save the adapter "
            "with path_initial_model_for_weight_conversion, which turns it into an ordinary one"
        )
    unknown = sorted(key for key, value in settings.items() if value and key not in USED | WITHOUT_EFFECT)
    if unknown:
        listed = ", ".join(f"{key} = {settings[key]!r}" for key in unknown)
        raise UnsupportedCheckpoint(f"{path} asks for what is not supported: {listed}")


def _pattern(patterns: dict[str, Any], module: str) -> str:
    """The first key of a pattern table that fits the module, as PEFT matches them: from any dot to the end."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)
