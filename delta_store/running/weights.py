"""Where a model's weights come from: base, fine-tune or artifact, each tensor read when it is asked for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.heads import variant_architecture
from deltaserve.delta_store.merge import variant_names, variant_tensor, variant_vocabulary
from deltaserve.delta_store.plain_model import plain_model, variant_config
from deltaserve.delta_store.profile import Profile


@dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    """A model that nobody has loaded. ``stored`` reads one of ``names``, in any dtype.

    ``tied``: head and embedding are one matrix. Where they are not and no head is among ``names``, it is a copy of the
    embedding. ``vocabulary`` counts the embedding's rows.
    """

    architecture: Architecture
    vocabulary: int
    tied: bool
    names: tuple[str, ...]
    stored: Callable[[str], Tensor]

    @property
    def config(self) -> Any:
        """Of a float32 model."""
        return variant_config(self.architecture, self.vocabulary, self.tied, torch.float32)

    def read(self, name: str) -> Tensor:
        """float32: the parameter or persistent buffer of this ``state_dict`` name, one that is tied included."""
        if name not in self.names:
            is_head = name == self.architecture.head
            name = self.architecture.embedding if is_head else self.architecture.tied[name]
        return self.stored(name).float()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the model needs, one after the other."""
        head = self.architecture.head
        own_head = [head] if head and not self.tied and head not in self.names else []
        return ((name, self.read(name)) for name in (*self.names, *own_head))

    def model(self) -> Any:
        """Loaded as a whole, in float32."""
        return plain_model(self.architecture, self.config, self.tensors(), torch.float32)


def of_base(base: Checkpoint) -> ModelWeights:
    """The bare base."""
    vocabulary = base.shape(base.architecture.embedding)[0]
    return ModelWeights(base.architecture, vocabulary, base.tied, base.names, base.read)


def of_fine_tune(fine_tune: FineTune) -> ModelWeights:
    """The full fine-tune, under its own names."""
    names, read = fine_tune.names, fine_tune.read
    return ModelWeights(fine_tune.architecture, fine_tune.vocabulary, fine_tune.tied, names, read)


def of_artifact(base: Checkpoint, artifact: Artifact, profile: Profile | None) -> ModelWeights:
    """The base with the artifact's delta in its weights."""
    names = variant_names(base, artifact)
    return ModelWeights(
        variant_architecture(base.architecture, artifact),
        variant_vocabulary(base, artifact),
        artifact.manifest.tied_head,
        tuple(names),
        lambda name: variant_tensor(base, artifact, names[name], profile, torch.float32),
    )
