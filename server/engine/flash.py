"""Flash attention over the paged cache, where transformers finds an installed kernel that this model can use."""

import logging

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

logger = logging.getLogger(__name__)

PAGE_TOKENS = 256
"""A page's tokens: flash-attn 2 reads pages of a multiple of this."""
DTYPES = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256
TOLERANCE = 0.05
"""Largest relative root-mean-square difference of logits from those with torch's attention, in half precision."""
PROBE = 24


def implementation(model: PreTrainedModel) -> str | None:
    """The name of the attention to set, None where torch's is to be used.

    A kernel is used if its logits over some tokens are those of torch's attention. float32 is no dtype of flash
    attention: it would be rounded.
    """
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    name = _installed() if model.device.type == "cuda" else None
    if name is None:
        return None
    if model.dtype not in DTYPES or width > WIDEST_HEAD or not model._supports_flash_attn:
        logger.warning("%s is installed, but not for %s with heads of %d", name, model.dtype, width)
        return None
    if not _agrees(model, name):
        logger.warning("%s does not give what torch's attention gives, and is not used", name)
        return None
    return name


def _installed() -> str | None:
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


@torch.no_grad()
def _agrees(model: PreTrainedModel, name: str) -> bool:
    before = model.config._attn_implementation
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    own = model(ids, use_cache=False).logits.float()
    try:
        model.set_attn_implementation(name)
        difference = model(ids, use_cache=False).logits.float() - own
    except (ImportError, RuntimeError, ValueError) as error:
        logger.warning("%s is installed and does not run: %s", name, error)
        return False
    finally:
        model.set_attn_implementation(before)
    return bool(difference.norm() <= TOLERANCE * own.norm())
