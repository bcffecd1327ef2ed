"""A PEFT LoRA adapter as a delta of its base: products where they are products, whole tensors where they are not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deltaserve.delta_store.bits import same_bits
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.delta import TensorDelta, check_finite, check_shapes
from deltaserve.delta_store.errors import CheckpointError, MissingTensors
from deltaserve.delta_store.lora_file import Entry, Roles, read_modules
from deltaserve.delta_store.lora_settings import LoraSettings, read_settings


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What an adapter does to one parameter: ``saved`` replaces it, ``scale * b @ a`` or ``scale * offset`` is added.

    ``a`` [r, in] and ``b`` [out, r]; PEFT sees an embedding as [width, rows] there. DoRA's ``magnitude`` [out] is the
    length that every row of the sum is then given.
    """

    saved: Entry | None = None
    a: Entry | None = None
    b: Entry | None = None
    of_embedding: bool = False
    offset: Entry | None = None
    magnitude: Entry | None = None
    scale: float = 1.0

    @property
    def is_product(self) -> bool:
        return self.a is not None and self.saved is None and self.magnitude is None

    def factors(self) -> tuple[Tensor, Tensor]:
        """float32 ``a`` and ``b`` of the [out, in] delta (an embedding: [rows, width]), the scale folded into ``b``."""
        a, b = self._read_product()
        if self.of_embedding:
            a, b = b.T, a.T
        return a.contiguous(), (self.scale * b).contiguous()

    def applied_to(self, weight: Tensor, transposed: bool) -> Tensor:
        """The parameter as the adapter leaves it: in the file's dtype where it is replaced, else float32."""
        start = weight if self.saved is None else self.saved.read()
        if self.offset is not None:
            return start.float() + self.scale * self.offset.read().float()
        if self.a is None:
            return start
        turned = transposed or self.of_embedding
        a, b = self._read_product()
        matrix = (start.float().T if turned else start.float()) + self.scale * (b @ a)
        if self.magnitude is not None:
            matrix = matrix * (self.magnitude.read().float() / torch.linalg.norm(matrix, dim=1))[:, None]
        return matrix.T.contiguous() if turned else matrix

    def _read_product(self) -> tuple[Tensor, Tensor]:
        if self.a is None or self.b is None:
            raise ValueError("This change adds no product")
        return self.a.read().float(), self.b.read().float()


class Adapter:
    """What an adapter changes in its base.

    ``low_rank`` has, for each weight that only gets a product, float32 ``a`` [r, in] and ``b`` [out, r] with
    ``delta = b @ a``: [out, in] also where the base stores [in, out], [rows, width] for an embedding. ``dense`` gives
    everything else whole: fully trained modules, biases, DoRA. ``tied_head``: the head follows the embedding's delta.
    """

    def __init__(self, base: Checkpoint, changes: dict[str, Change], tied_head: bool) -> None:
        self.base = base
        self.tied_head = tied_head
        self.low_rank = {name: change.factors() for name, change in sorted(changes.items()) if change.is_product}
        self._whole = {name: change for name, change in sorted(changes.items()) if not change.is_product}

    @property
    def dense(self) -> Iterator[TensorDelta]:
        """Every tensor that is not a product and differs from the base's, read when it is asked for."""
        for name, change in self._whole.items():
            weight = self.base.read(self.base.held_as(name))
            transposed = name in self.base.architecture.transposed
            delta = TensorDelta(name, (weight, change.applied_to(weight, transposed)), transposed)
            if not same_bits(*delta.raw):
                check_finite(delta)
                yield delta


def is_adapter(path: str | Path) -> bool:
    """Whether ``path`` is a folder that PEFT saved an adapter in."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def open_adapter(path: str | Path, base: Checkpoint) -> Adapter:
    """Open the folder of a LoRA adapter: what it would do to an unmerged PEFT model, it does to the base.

    Every tensor in the file is used and every setting heeded. Otherwise it raises, by name: UnsupportedCheckpoint for
    settings and tensors that have no place, MissingTensors for what is announced and not there, CheckpointError for
    modules that the base does not have and shapes that do not fit.
    """
    folder = Path(path).expanduser()
    settings = read_settings(folder)
    modules = read_modules(folder, base.architecture.shapes)
    _check_announced(settings, modules, folder)
    changes: dict[str, Change] = {}
    for module, roles in modules.items():
        changes |= _changes(module, roles, settings, folder)
    changes = _without_unchanged(_with_tied_bases(changes, modules, base), base)
    tied_head = _settle_head(changes, base)
    for name, change in changes.items():
        _check_fits(name, change, base)
    _check_vocabulary(changes, base, tied_head)
    return Adapter(base, changes, tied_head)


def _changes(module: str, roles: Roles, settings: LoraSettings, folder: Path) -> dict[str, Change]:
    a = roles.get("lora_A.weight") or roles.get("lora_embedding_A")
    b = roles.get("lora_B.weight") or roles.get("lora_embedding_B")
    magnitude = roles.get("lora_magnitude_vector")
    if (magnitude is not None) != (settings.dora and a is not None):
        has = "has no" if magnitude is None else "has a"
        raise MissingTensors(f"{folder}: use_dora is {settings.dora}, and {module} {has} lora_magnitude_vector")
    scale = settings.scale(module, a.header.shape[0]) if a is not None else 1.0
    weight = Change(
        saved=roles.get("weight") or roles.get("base_layer.weight"),
        a=a,
        b=b,
        of_embedding="lora_embedding_A" in roles,
        magnitude=magnitude,
        scale=scale,
    )
    bias = Change(saved=roles.get("bias") or roles.get("base_layer.bias"), offset=roles.get("lora_B.bias"), scale=scale)
    return {
        f"{module}.{kind}": change
        for kind, change in (("weight", weight), ("bias", bias))
        if change.saved is not None or change.a is not None or change.offset is not None
    }


def _with_tied_bases(changes: dict[str, Change], modules: dict[str, Roles], base: Checkpoint) -> dict[str, Change]:
    """A saved ``base_layer`` of one of a tied pair is the other's too: only what is trained parts them."""
    one, other = base.architecture.embedding, base.architecture.head
    if not base.tied or other is None:
        return changes
    result = dict(changes)
    for name, partner in ((one, other), (other, one)):
        shared = modules.get(name.removesuffix(".weight"), {}).get("base_layer.weight")
        change = result.get(partner, Change())
        if shared is not None and change.saved is None:
            result[partner] = replace(change, saved=shared)
    return result


def _without_unchanged(changes: dict[str, Change], base: Checkpoint) -> dict[str, Change]:
    """PEFT saves embeddings and heads whenever they are adapted; what only repeats the base's values is no change."""
    result = {}
    for name, change in changes.items():
        if change.saved is not None and same_bits(change.saved.read(), base.read(base.held_as(name))):
            change = replace(change, saved=None)
        if change.saved is not None or change.a is not None or change.offset is not None:
            result[name] = change
    return result


def _settle_head(changes: dict[str, Change], base: Checkpoint) -> bool:
    """Whether embedding and head stay one matrix; where both are given the same values, the head's are dropped."""
    if not base.tied or base.architecture.head is None:
        return False
    embedding, head = changes.get(base.architecture.embedding), changes.get(base.architecture.head)
    if embedding is None and head is None:
        return True
    if embedding is None or head is None or embedding.saved is None or head.saved is None:
        return False
    if embedding.a or head.a or not same_bits(embedding.saved.read(), head.saved.read()):
        return False
    del changes[base.architecture.head]
    return True


def _check_announced(settings: LoraSettings, modules: dict[str, Roles], folder: Path) -> None:
    saved = [f".{module}." for module, roles in modules.items() if "weight" in roles or "bias" in roles]
    missing = [name for name in settings.modules_to_save if not any(f".{name}." in path for path in saved)]
    if missing:
        raise MissingTensors(f"{folder}: modules_to_save names what the file does not hold: {', '.join(missing)}")


def _check_fits(name: str, change: Change, base: Checkpoint) -> None:
    shape = base.shape(base.held_as(name))
    if change.saved is not None:
        check_shapes(name, shape, change.saved.header.shape, base)
        shape = change.saved.header.shape
    turned = change.of_embedding or name in base.architecture.transposed
    matrix = shape[::-1] if turned else shape
    if change.a is not None and change.b is not None:
        a, b = change.a.header.shape, change.b.header.shape
        if (*b[:1], *a[1:]) != matrix or b[1:] != a[:1]:
            raise CheckpointError(f"{name}: lora_A {list(a)} and lora_B {list(b)} do not make a {list(matrix)} weight")
    for entry in (change.offset, change.magnitude):
        if entry is not None and entry.header.shape != matrix[:1]:
            raise CheckpointError(f"{entry.key!r} has shape {list(entry.header.shape)}, not {list(matrix[:1])}")


def _check_vocabulary(changes: dict[str, Change], base: Checkpoint, tied_head: bool) -> None:
    if base.architecture.head is None or tied_head:
        return
    rows = {}
    for name in (base.architecture.embedding, base.architecture.head):
        saved = changes[name].saved if name in changes else None
        rows[name] = base.shape(base.held_as(name))[0] if saved is None else saved.header.shape[0]
    if len(set(rows.values())) > 1:
        listed = " and ".join(f"{name} {count}" for name, count in rows.items())
        raise CheckpointError(f"The adapter gives embedding and head different numbers of rows: {listed}")
