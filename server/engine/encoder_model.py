"""An encoder whose layers know deltas: which parameters can have one, whole variants in slots, and a batch of texts.

Layers that have a row for each token, or for each text, become delta-aware twins, so that a batch holds texts of many
variants. What a family computes otherwise (positions relative to each other, say) is put in whole for a variant, whose
texts then share a batch with no others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.errors import UnsupportedArtifact
from deltaserve.kernels import reference
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.parts import Delta
from deltaserve.server.engine import encoder_form, huge_pages
from deltaserve.server.engine.encoder_head import Head, is_classifier
from deltaserve.server.engine.layers import DeltaLayer, DeltaLinear, Prepared, become, twin_of, unite
from deltaserve.server.engine.routing import Rows
from deltaserve.server.engine.wrapped import families_of, nbytes_of


@dataclass(frozen=True, slots=True)
class EncoderDeltas:
    """What an artifact holds: deltas by the base's names (whole tensors where the base has none), and the model."""

    deltas: Iterable[tuple[str, Delta]]
    architecture: Architecture


@dataclass(frozen=True, slots=True, eq=False)
class FittedEncoder:
    """A version in the layout of the layers; ``vocabulary`` counts the token ids that it knows.

    ``whole`` are parameters that are put in for its batches; ``head`` classifies, None where it has none.
    """

    prepared: Mapping[str, Prepared]
    whole: Mapping[str, Tensor]
    head: Head | None
    vocabulary: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Hidden:
    """Of a batch: last hidden states ``[rows, width]``, the texts' ``lengths`` int64, and what the pooler gave."""

    rows: Tensor
    lengths: Tensor
    pooled: Tensor | None


class WrappedEncoder:
    """Turns the layers of ``model``'s body into their twins, with ``slots`` places for variants.

    ``tensor(name)`` reads a parameter of the base by its name there, ``architecture`` is the base's. ``head`` is the
    base's own, ``form`` how batches are laid out, ``tokens`` and ``texts`` whose rows they have. Raises
    UnsupportedCheckpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        tensor: Callable[[str], Tensor],
        slots: int,
        backend: Backend,
        *,
        kept: str = "plain",
    ) -> None:
        self._body = body = model.base_model
        self._architecture, self._tensor, self._backend = architecture, tensor, backend
        self._pooler: nn.Module | None = getattr(body, "pooler", None)
        self._padding = getattr(body.config, "pad_token_id", None) or 0
        self._embedding = architecture.embedding
        self.vocabulary = body.get_input_embeddings().weight.shape[0]
        self.width: int = body.config.hidden_size
        trial = encoder_form.tried(body, self._pooler, self._padding, self.vocabulary)
        self.form = trial.form
        self.tokens, self.texts = Rows(), Rows()
        families = families_of([m for m in trial.kinds if twin_of(m) is DeltaLinear], self._try)
        self._layers: dict[str, tuple[DeltaLayer, str]] = {}
        self._others: dict[str, nn.Parameter] = {}
        for name, module in list(body.named_modules()):
            twin, kind = twin_of(module), trial.kinds.get(module, "others")
            if twin is not None and kind != "others":
                become(module, twin, self.tokens if kind == "tokens" else self.texts, slots, backend)
                if kept == "int8" and isinstance(module, DeltaLinear):
                    module.quantise()
            for parameter, values in module.named_parameters(recurse=False):
                path = ".".join(part for part in (architecture.body.rstrip("."), name, parameter) if part)
                if twin is not None and kind != "others":
                    self._layers[path] = module, parameter
                else:
                    self._others[path] = values
        huge_pages.move(body.parameters())
        self._own = {name: parameter.data for name, parameter in self._others.items()}
        for family in families:
            if united := [module for module in family if isinstance(module, DeltaLinear)]:
                unite(united, slots, backend, copies=kept == "packed")
        self.shapes = {name: layer.shape_of(parameter) for name, (layer, parameter) in self._layers.items()}
        self.shapes |= {name: tuple(values.shape) for name, values in self._others.items()}
        self.head = Head(architecture, tensor, pooler=self._pooler is not None) if is_classifier(architecture) else None

    def check(self, shapes: Mapping[str, tuple[int, ...]], theirs: Architecture) -> int:
        """A variant's vocabulary. Raises UnsupportedArtifact if its deltas, all told, do not fit base and head."""
        for name, shape in shapes.items():
            self._check_shape(name, shape, theirs)
        ours = self._architecture
        wanted = {theirs.name_in(ours, name): theirs.shapes[name] for name in theirs.shapes.keys() - theirs.tied.keys()}
        lacks = [n for n, shape in sorted(wanted.items()) if ours.shapes.get(n) != shape and n not in shapes]
        if lacks:
            raise UnsupportedArtifact(f"The artifact is of a {theirs.name} and lacks {', '.join(lacks)}")
        return shapes.get(self._embedding, (self.vocabulary,))[0]

    def _check_shape(self, name: str, shape: tuple[int, ...], theirs: Architecture) -> None:
        named = {theirs.name_in(self._architecture, own): theirs.shapes[own] for own in theirs.shapes}
        own = self.shapes.get(name) or named.get(name) or self._architecture.shapes.get(name)
        if own is None:
            raise UnsupportedArtifact(f"Neither the base nor a {theirs.name} has a parameter {name}")
        grows = name == self._embedding and name in self._layers and shape[0] > own[0] and shape[1:] == own[1:]
        if shape != own and not grows:
            raise UnsupportedArtifact(f"{name} has shape {list(shape)} in the artifact, {list(own)} in the model")

    def fit(self, version: EncoderDeltas) -> FittedEncoder:
        """Bring a version into the layers' layout, one tensor at a time. Raises UnsupportedArtifact."""
        prepared: dict[str, Prepared] = {}
        whole: dict[str, Tensor] = {}
        above: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        with self._backend.one_variant() as lay_out:
            for name, delta in version.deltas:
                self._check_shape(name, delta.shape, version.architecture)
                shapes[name] = delta.shape
                if name in self._layers:
                    prepared[name] = self._layers[name][0].prepare(delta, lay_out)
                elif name in self._others:
                    values = self._own[name]  # a variant's own may be in its place just now
                    whole[name] = (values.float() + reference.unpack(delta)).to(values.dtype)
                else:
                    above[name] = reference.unpack(delta)
        vocabulary = self.check(shapes, version.architecture)
        head = self._head(version.architecture, above)
        nbytes = sum(nbytes_of(values) for values in (*prepared.values(), *whole.values()))
        own_head = head.nbytes if head is not None and head is not self.head else 0
        return FittedEncoder(prepared, whole, head, vocabulary, nbytes + own_head)

    def install(self, slot: int, fitted: FittedEncoder) -> None:
        """Put a version into a slot that no running request uses; safe while the model runs."""
        for name, prepared in fitted.prepared.items():
            layer, parameter = self._layers[name]
            layer.install(parameter, slot, prepared)

    def clear(self, slot: int) -> None:
        """Forget what is in a slot that no running request uses; safe while the model runs."""
        for layer, parameter in self._layers.values():
            layer.install(parameter, slot, None)

    @torch.inference_mode()
    def run(self, texts: Sequence[Sequence[int]], slots: Sequence[int], whole: Mapping[str, Tensor]) -> Hidden:
        """One batch: each text with the slot of its variant. ``whole`` is that of the one variant it is of, if any."""
        lengths = [len(text) for text in texts]
        rows = lengths if self.form.flat else [max(lengths)] * len(texts)
        self.tokens.assign(rows, slots)
        self.texts.assign([1] * len(texts), slots)
        with self._with(whole):
            hidden, pooled = encoder_form.run(self._body, self._pooler, self.form, texts, self._padding)
        return Hidden(hidden, torch.tensor(lengths), pooled)

    def _try(self) -> None:
        encoder_form.run(self._body, self._pooler, self.form, [[0, 0]], self._padding)

    def _head(self, architecture: Architecture, above: Mapping[str, Tensor]) -> Head | None:
        """The variant's head: what the artifact brings, on the base's where that has the like of it."""
        if architecture is self._architecture and not above:
            return self.head
        if not is_classifier(architecture):
            return None

        def tensor(name: str) -> Tensor:
            ours = architecture.name_in(self._architecture, name)
            has = self._architecture.shapes.get(ours) == architecture.shapes[name]
            if ours not in above:
                return self._tensor(ours).float()
            return above[ours] + self._tensor(ours).float() if has else above[ours]

        return Head(architecture, tensor, pooler=self._pooler is not None)

    @contextmanager
    def _with(self, whole: Mapping[str, Tensor]) -> Iterator[None]:
        """These parameters in the place of the base's; only one thread runs the model."""
        for name, values in whole.items():
            self._others[name].data = values
        try:
            yield
        finally:
            for name in whole:
                self._others[name].data = self._own[name]
