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
    if model.device.type != "cuda":
        return None
    name = installed()
    why = "no flash-attn package is installed" if name is None else unfit(model, name)
    if why is None:
        logger.info("Attention by %s, and decoding steps as CUDA graphs", name)
        return name
    logger.warning("Attention by torch, request by request, and no CUDA graphs: %s", why)
    return None


def unfit(model: PreTrainedModel, name: str) -> str | None:
    """Why an installed kernel is not for this model, None if it is."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if model.dtype not in DTYPES or width > WIDEST_HEAD or not model._supports_flash_attn:
        return f"{name} is not for {type(model).__name__} in {model.dtype} with heads of {width}"
    return _difference(model, name)


def installed() -> str | None:
    if is_flash_attn_3_available():
        return "flash_attention_3"
    return "flash_attention_2" if is_flash_attn_2_available() else None


@torch.no_grad()
def _difference(model: PreTrainedModel, name: str) -> str | None:
    """How the logits differ from those of the model's present attention, None if they do not."""
    before = model.config._attn_implementation
    ids = torch.arange(PROBE, device=model.device)[None] % model.config.get_text_config().vocab_size
    own = model(ids, use_cache=False).logits.float()
    try:
        model.set_attn_implementation(name)
        difference = model(ids, use_cache=False).logits.float() - own
    except (ImportError, RuntimeError, ValueError) as error:
        return f"{name} does not run: {error}"
    finally:
        model.set_attn_implementation(before)
    share = float(difference.norm() / own.norm())
    return None if share <= TOLERANCE else f"logits with {name} differ from torch's by {share:.0%}"  # NaN differs
