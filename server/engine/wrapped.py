"""A model whose layers know deltas: which parameters can have one, and whole variants going in and out of slots."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaserve.delta_store.errors import UnsupportedArtifact
from deltaserve.kernels.dispatch import Backend
from deltaserve.kernels.parts import Delta, Sparse
from deltaserve.server.engine import huge_pages
from deltaserve.server.engine.blocks import stack
from deltaserve.server.engine.layers import (
    DeltaEmbedding,
    DeltaLayer,
    DeltaLinear,
    Prepared,
    become,
    twin_of,
    unite,
)
from deltaserve.server.engine.norms import DeltaNorm
from deltaserve.server.engine.parallel.sharding import Sharding
from deltaserve.server.engine.routing import Routing


@dataclass(frozen=True, slots=True)
class VersionDeltas:
    """What an artifact holds for this base: deltas by parameter name, and whether its head follows its embedding.

    ``stop_ids``: its own end-of-sequence tokens, None where they are the base's.
    """

    deltas: Iterable[tuple[str, Delta]]
    tied_head: bool
    stop_ids: frozenset[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A version's deltas in the layout of the layers. ``vocabulary`` counts the token ids that it knows.

    ``norms``: those that layers copy when the version is put into a slot; empty from then on.
    ``overwrites``: bytes of the base's weights that swapping it in would change, and keep a copy of.
    """

    prepared: Mapping[str, Prepared]
    nbytes: int
    vocabulary: int
    stop_ids: frozenset[int] | None
    overwrites: int = 0
    norms: dict[str, Tensor] = field(default_factory=dict)


class WrappedModel:
    """Turns the layers of ``model`` into their twins, with ``slots`` places for variants.

    ``tied``: input embedding and output head of the base are one matrix. ``shapes`` are those of the parameters that
    can have a delta, by their names in the model's state dict. ``kept`` says how linear layers keep their weights:
    plain; int8; or packed, plain with a second copy in a library's layout wherever that is measured to be faster.

    Variants are swapped into the body: ``weights`` (``[out, in]``, the model's own memory) and the biases and norms of
    ``vectors``. Embeddings and head stay as they are: their deltas are cheap beside them, and mostly of low rank, so
    that swapping would rewrite the largest matrix of a small model. ``fixed`` says why no variant can be swapped in.

    ``sharding``: the layers are a process's share of the base. Whole deltas are checked, then cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        slots: int,
        backend: Backend,
        *,
        tied: bool,
        kept: str = "plain",
        sharding: Sharding | None = None,
    ) -> None:
        self.tied = tied
        self._sharding = sharding
        self.backend = backend
        self._embedding, self._head = _weight_names(model)
        self._layers: dict[str, tuple[DeltaLayer, str]] = {}
        body = f"{model.base_model_prefix}."
        keeps_few = bool(model._supports_logits_to_keep())
        linears = [module for module in model.modules() if twin_of(module) is DeltaLinear]
        ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        families = families_of(linears, lambda: model(ids, use_cache=False))
        for name, module in list(model.named_modules()):
            if (twin := twin_of(module, is_head=f"{name}.weight" == self._head)) is None:
                continue
            rows = routing.tokens if name.startswith(body) or not keeps_few else routing.logits
            if name.startswith(body) and twin is not DeltaEmbedding:
                rows = routing.body
            become(module, twin, rows, slots, backend)
            if kept == "int8" and isinstance(module, DeltaLinear):
                module.quantise()
            for parameter, _ in module.named_parameters():
                self._layers[f"{name}.{parameter}"] = (module, parameter)
        huge_pages.move(model.parameters())
        for family in families:
            unite(family, slots, backend, copies=kept == "packed")
        self.is_stacked = kept != "packed" and stack(model, routing.body, backend)
        inside = {name: at for name, at in self._layers.items() if at[0].rows is routing.body}
        self.weights = {
            name: layer.own_weight().values
            for name, (layer, parameter) in inside.items()
            if isinstance(layer, DeltaLinear) and parameter == "weight"
        }
        self.vectors = {
            name: (layer, parameter)
            for name, (layer, parameter) in inside.items()
            if name not in self.weights and isinstance(layer, DeltaLinear | DeltaNorm)
        }
        self.fixed = self._why_fixed(kept)
        self.shapes = {
            name: self._whole_shape(name, layer.shape_of(parameter))
            for name, (layer, parameter) in self._layers.items()
        }
        self.vocabulary = self.shapes[self._embedding][0]

    def check_whole(self, shapes: Mapping[str, tuple[int, ...]], tied_head: bool) -> int:
        """The variant's vocabulary. Raises UnsupportedArtifact if its deltas, all told, do not fit the model."""
        self.check(shapes)
        vocabulary = shapes.get(self._embedding, self.shapes[self._embedding])[0]
        head = self._embedding if self.tied and tied_head else self._head
        if vocabulary > self.vocabulary and shapes.get(head, (0,))[0] != vocabulary:
            raise UnsupportedArtifact(
                f"{self._embedding} has {vocabulary} rows and {self._head} has not; both must grow"
            )
        return vocabulary

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UnsupportedArtifact for deltas of these names and shapes that do not fit the model."""
        differing = {name: shape for name, shape in shapes.items() if self.shapes.get(name) != shape}
        if unknown := sorted(differing.keys() - self.shapes.keys()):
            raise UnsupportedArtifact(
                f"No layer of this base can take a delta of {', '.join(unknown[:5])}{' ...' if unknown[5:] else ''} "
                f"({len(unknown)} of {len(shapes)} tensors): these parameters or their kind of layer are not supported"
            )
        for name, shape in differing.items():
            own = self.shapes[name]
            grows = name in (self._embedding, self._head) and shape[0] > own[0] and shape[1:] == own[1:]
            if not grows:
                raise UnsupportedArtifact(
                    f"The delta of {name} has shape {list(shape)}, the base's parameter {list(own)}"
                )

    def fit(self, version: VersionDeltas) -> Fitted:
        """Bring a version into the layers' layout, one tensor at a time. Raises UnsupportedArtifact."""
        prepared: dict[str, Prepared] = {}
        norms: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        overwrites = 0
        with self.backend.one_variant() as lay_out:
            for name, delta in version.deltas:
                self.check({name: delta.shape})
                shapes[name] = delta.shape
                share = delta if self._sharding is None else self._sharding.cut(name, delta)
                if share is None:
                    continue
                layer = self._layers[name][0]
                (norms if isinstance(layer, DeltaNorm) else prepared)[name] = layer.prepare(share, lay_out)
                if name in self.weights:
                    overwrites += _changed_values(share) * self.weights[name].element_size()
        vocabulary = self.check_whole(shapes, version.tied_head)
        nbytes = sum(nbytes_of(values) for values in (*prepared.values(), *norms.values()))
        if self.tied and version.tied_head and self._embedding in prepared:
            prepared[self._head] = prepared[self._embedding]
        return Fitted(prepared, nbytes, vocabulary, version.stop_ids, overwrites, norms)

    def install(self, slot: int, fitted: Fitted) -> None:
        """Put a version into a slot that no running request uses, once; safe while the model runs."""
        for name, prepared in (*fitted.prepared.items(), *fitted.norms.items()):
            layer, parameter = self._layers[name]
            layer.install(parameter, slot, prepared)
        fitted.norms.clear()

    def clear(self, slot: int) -> None:
        """Forget what is in a slot that no running request uses; safe while the model runs."""
        for layer, parameter in self._layers.values():
            layer.install(parameter, slot, None)

    def _whole_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape if self._sharding is None else self._sharding.whole_shape(name, shape)

    def _why_fixed(self, kept: str) -> str | None:
        if self._sharding is not None:
            return "they lie on several processes"
        if kept == "int8":
            return "int8 weights cannot hold the sum of base and delta"
        if kept == "packed":
            return "packed weights are copies that a swap does not reach"
        if self.backend.NAME == "reference":
            return "the reference kernels cannot swap in what they have prepared"
        if len({weight.data_ptr() for weight in self.weights.values()}) < len(self.weights):
            return "some of the base's layers share a weight"
        return None


@torch.no_grad()
def families_of(linears: Sequence[nn.Module], run: Callable[[], object]) -> list[list[Any]]:
    """All linear layers; those that ``run``, done once, calls in a row with the very same input stand together."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0], args[0].clone())))
        for module in linears
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    once = {module for module, times in Counter(module for module, _, _ in calls).items() if times == 1}
    families: list[list[nn.Module]] = []
    previous: tuple[Tensor, Tensor] | None = None
    for module, x, copy in calls:
        if module in once:
            same = previous is not None and x is previous[0] and torch.equal(copy, previous[1])
            families.append([*families.pop(), module] if same else [module])
            previous = (x, copy)
    return families + [[module] for module in linears if module not in once]


def _weight_names(model: PreTrainedModel) -> tuple[str, str]:
    """The names of the input embedding's and the output head's weights."""
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(f"{names[id(m)]}.weight" for m in (model.get_input_embeddings(), model.get_output_embeddings()))  # type: ignore[return-value]


def nbytes_of(prepared: Prepared) -> int:
    """Memory that a delta takes in its layer."""
    return prepared.nbytes if isinstance(prepared, Tensor) else int(prepared.nbytes)


def _changed_values(delta: Delta) -> int:
    """Kept columns of a sparse part alone; any other delta changes the whole weight."""
    alone = delta.parts[0] if len(delta.parts) == 1 else None
    return delta.shape[0] * alone.columns.shape[1] if isinstance(alone, Sparse) else prod(delta.shape)
