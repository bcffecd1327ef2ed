"""An encoder's variant with a head of its own: which model it is, told by the config.json that its artifact brings."""

import json
from copy import deepcopy
from typing import Any

import transformers

from deltaserve.delta_store.architecture import Architecture, architecture_of
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.delta import disagreeing
from deltaserve.delta_store.errors import CorruptArtifact, UnsupportedArtifact
from deltaserve.delta_store.variant_files import WITHOUT_MEANING

CONFIG = "config.json"
LARGEST_CONFIG = 4 << 20
MOST_LABELS = 1 << 16


def config_file(base: Architecture, fine: Architecture) -> dict[str, bytes]:
    """The fine-tune's config.json for its artifact, where head or labels are not the base's."""
    if not base.is_encoder or (base.name == fine.name and _head_settings(base.config) == _head_settings(fine.config)):
        return {}
    settings = {key: value for key, value in fine.config.to_dict().items() if key not in WITHOUT_MEANING}
    return {CONFIG: json.dumps(settings | {"architectures": [fine.name]}, indent=2, sort_keys=True).encode()}


def variant_architecture(base: Architecture, artifact: Artifact) -> Architecture:
    """The variant's own architecture: the base's body under the head that its artifact names, or the base's whole.

    Of the configuration that comes along only what is about the head is believed; the rest must agree with the base's.
    Raises CorruptArtifact, UnsupportedArtifact.
    """
    if CONFIG not in artifact.file_names:
        return base
    told = _read(artifact)
    model_class = _model_class(base, told, artifact)
    labels = _labels(told, artifact)
    config = deepcopy(base.config)
    try:
        for key in _head_settings(config).keys() & told.keys():
            setattr(config, key, told[key])
        config.id2label, config.label2id = labels, {label: number for number, label in labels.items()}
        config.architectures = [model_class.__name__]
        return architecture_of(config, model_class)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedArtifact(f"{artifact.path}: its {CONFIG} makes no {model_class.__name__}: {error}") from error


def _head_settings(config: Any) -> dict[str, Any]:
    settings = config.to_dict()
    return {
        key: value
        for key, value in settings.items()
        if key in ("id2label", "problem_type") or key.startswith("classifier_")
    }


def _read(artifact: Artifact) -> dict[str, Any]:
    content = artifact.files[CONFIG]
    if len(content) > LARGEST_CONFIG:
        raise CorruptArtifact(f"{artifact.path}: its {CONFIG} has {len(content)} bytes; the limit is {LARGEST_CONFIG}")
    try:
        told = json.loads(content)
    except ValueError as error:
        raise CorruptArtifact(f"{artifact.path}: its {CONFIG} is not valid JSON: {error}") from error
    if not isinstance(told, dict):
        raise CorruptArtifact(f"{artifact.path}: its {CONFIG} is not a JSON object")
    return told


def _model_class(base: Architecture, told: dict[str, Any], artifact: Artifact) -> Any:
    if differing := disagreeing(base.config, told):
        raise UnsupportedArtifact(f"{artifact.path}: its {CONFIG} differs from the base's in {', '.join(differing)}")
    name = (told.get("architectures") or [None])[0]
    classes = (transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, transformers.MODEL_MAPPING)
    for model_class in (mapping.get(type(base.config), None) for mapping in classes):
        if model_class is not None and model_class.__name__ == name:
            return model_class
    raise UnsupportedArtifact(
        f"{artifact.path} is a {name!r}; beside the base's own architecture, only variants that classify whole texts "
        "are supported"
    )


def _labels(told: dict[str, Any], artifact: Artifact) -> dict[int, str]:
    labels = told.get("id2label")
    if not isinstance(labels, dict) or not 1 <= len(labels) <= MOST_LABELS:
        raise UnsupportedArtifact(f"{artifact.path}: its {CONFIG} has no id2label of 1 to {MOST_LABELS} labels")
    numbered = {str(number): str(label) for number, label in labels.items()}
    if set(numbered) != {str(number) for number in range(len(numbered))}:
        raise UnsupportedArtifact(f"{artifact.path}: the labels in its {CONFIG} are not numbered from 0 on")
    return {number: numbered[str(number)] for number in range(len(numbered))}
