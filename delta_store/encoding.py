"""What stands for a whole fine-tune under a method: the parts of every tensor that it changes."""

from collections.abc import Callable, Mapping
from math import prod

from deltaserve.delta_store.architecture import Architecture
from deltaserve.delta_store.artifact_file import Parts
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.specs import FactorsSpec, SparseSpec
from deltaserve.delta_store.errors import UnsupportedCheckpoint
from deltaserve.delta_store.fine_tune import Change, FineTune
from deltaserve.delta_store.heap import give_back
from deltaserve.delta_store.plain_model import embedding_names
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import Method
from deltaserve.delta_store.pruning.options import Options
from deltaserve.delta_store.pruning.weights import BaseFacts
from deltaserve.delta_store.pruning.whole import Encoded, dense, exact_codec

Count = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

Known = Mapping[str, Parts]
"""Parts by parameter."""

NOTHING_KNOWN: Known = {}


def facts_of(architecture: Architecture, profile: Profile | None) -> BaseFacts:
    """What methods know of this base."""
    config = architecture.config.get_text_config(decoder=True)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    whole_heads = width // heads if heads and width else None
    return BaseFacts(profile, embedding_names(architecture), getattr(config, "head_dim", None) or whole_heads)


def encode_parts(
    chosen: Method,
    settings: Options,
    base: Checkpoint,
    fine_tune: FineTune,
    facts: BaseFacts,
    progress: Count = lambda done, total: None,
    known: Known = NOTHING_KNOWN,
) -> Parts:
    """What stands for the fine-tune under a method; one tensor of it is in memory at a time.

    ``known`` is what stands for some of its tensors already.
    """
    result: Parts = []
    enough = max(prod(base.shape(name)) for name in base.names)  # values read; giving memory back costs page faults
    freed = 0
    for done, change in enumerate(fine_tune.changes()):
        progress(done, fine_tune.tensor_count)
        if change.name in known:
            result += known[change.name]
        elif change.is_whole:
            result.append((change.name, *_whole(change)))
        else:
            shape = base.shape(base.held_as(change.name))
            _check_shape(change.name, shape)
            result += [(change.name, spec, part) for spec, part in chosen.function(change, settings, facts)]
            freed += prod(shape)
        if freed >= enough:
            give_back()
            freed = 0
    give_back()
    return result


def _whole(change: Change) -> Encoded:
    """All of a tensor that the base lacks, exactly."""
    values = change.read().fine
    _check_shape(change.name, tuple(values.shape))
    return dense(values, exact_codec(values))


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) not in (1, 2):
        raise UnsupportedCheckpoint(
            f"{name} has shape {list(shape)}; only matrices and vectors can be stored, "
            "so a fine-tune must leave it as it is"
        )


def divisors(parts: Parts) -> tuple[float, float] | None:
    """The least and the largest q."""
    found = [spec.divisor for _, spec, _ in parts if isinstance(spec, SparseSpec | FactorsSpec)]
    return (min(found), max(found)) if found else None
