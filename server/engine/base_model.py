"""The base, loaded and with layers that know deltas: whole, or a process's share of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.errors import UnsupportedCheckpoint
from deltaserve.server.engine import attention, flash
from deltaserve.server.engine.device import choose
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.parallel import group
from deltaserve.server.engine.parallel.sharding import Sharding
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.slots import SPARE
from deltaserve.server.engine.variant_engine import checked_kind
from deltaserve.server.engine.wrapped import WrappedModel


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The model, whose rows belong to whom ``routing`` says; ``flash_attention`` names the attention to use, if any."""

    model: PreTrainedModel
    wrapped: WrappedModel
    routing: Routing
    flash_attention: str | None


def load_base(
    checkpoint: Checkpoint,
    limits: EngineLimits,
    routing: type[Routing] = Routing,
    sharding: Sharding | None = None,
    meet: Callable[[torch.device], None] = lambda device: None,
) -> Base:
    """Load a base. With ``sharding``, ``meet`` is called before the share is first computed with.

    Raises CheckpointError, OptionError.
    """
    device, kernels = choose(limits.device, limits.backend, checked_kind(limits.weights))
    model = _load(checkpoint, limits.dtype)
    if sharding is not None:
        sharding.narrow(model, group.add_up)
    model = model.to(device)
    meet(device)
    flash_attention = flash.implementation(model)
    slots = limits.bank_slots + SPARE
    rows = routing(lambda: kernels.tiles(limits.batch_tokens, slots, limits.max_running + 1))
    wrapped = WrappedModel(model, rows, slots, kernels, tied=checkpoint.tied, kept=limits.weights, sharding=sharding)
    return Base(model, wrapped, rows, flash_attention)


def _load(checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    config = model.config.get_text_config()
    if (feature := attention.unsupported(config)) is not None:
        raise UnsupportedCheckpoint(
            f"{checkpoint.folder} ({type(model).__name__}) uses {feature}, which is not supported yet"
        )
    return model.eval()
