"""The classification head of one version: the family's own code, above hidden states that are there already."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.errors import UnsupportedArtifact


class StandIn(nn.Module):
    """In the place of the body: gives what was put into it. ``pooler`` is there where the served body has none."""

    def __init__(self, pooler: nn.Module | None) -> None:
        super().__init__()
        self.pooler = pooler
        self.hidden: Tensor | None = None
        self.pooled: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        pooled = self.pooled if self.pooler is None else self.pooler(self.hidden)
        return BaseModelOutputWithPooling(last_hidden_state=self.hidden, pooler_output=pooled)


class Head:
    """``labels`` in the order of the scores; ``nbytes`` of its parameters."""

    def __init__(self, architecture: Architecture, tensor: Callable[[str], Tensor], *, pooler: bool) -> None:
        """``tensor(name)`` gives a parameter by the variant's own name; ``pooler``: the served body has one.

        Raises UnsupportedArtifact where one does not fit.
        """
        config = architecture.config
        with torch.device("meta"):
            model = getattr(transformers, architecture.name)(config)
        own = None if pooler else getattr(model.base_model, "pooler", None)
        self._body = StandIn(own)
        setattr(model, model.base_model_prefix, self._body)
        parameters = {name: tensor(name) for name in model.state_dict()}
        try:
            model.load_state_dict(parameters, assign=True)
        except RuntimeError as error:
            raise UnsupportedArtifact(f"The head does not fit a {architecture.name}: {error}") from error
        self._model = model.eval()
        self._activation = _activation(config)
        self.labels = tuple(config.id2label[number] for number in range(config.num_labels))
        self.nbytes = sum(values.nbytes for values in parameters.values())

    @torch.inference_mode()
    def scores(self, hidden: Tensor, kept: Tensor, pooled: Tensor | None) -> Tensor:
        """float32 ``[texts, labels]`` of ``hidden`` ``[texts, longest, width]``; ``kept`` is False on its padding.

        ``pooled`` ``[texts, width]`` is what the served body's own pooler gave.
        """
        self._body.hidden, self._body.pooled = hidden, pooled
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
            logits: Tensor = self._model(input_ids=ids, attention_mask=kept.long()).logits
        finally:
            self._body.hidden = self._body.pooled = None
        return self._activation(logits.float())


def is_classifier(architecture: Architecture) -> bool:
    """Whether it gives scores to whole texts."""
    return transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(architecture.config), None) is getattr(
        transformers, architecture.name
    )


def _activation(config: Any) -> Callable[[Tensor], Tensor]:
    """Probabilities of one label or another, or of each for itself; a regression's number stays as it is."""
    if config.problem_type == "regression":
        return lambda logits: logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)
