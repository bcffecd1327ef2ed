"""Random models of a few kilobytes, fine-tunes of them, and a tokenizer, for every test that needs one."""

from copy import deepcopy
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Model = TypeVar("Model", bound=PreTrainedModel)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_llama(
    seed: int = 0,
    vocab: int = 64,
    tied: bool = True,
    hidden: int = 32,
    layers: int = 2,
    context: int = 256,
    attention_bias: bool = False,
) -> LlamaForCausalLM:
    """A Llama with grouped queries (4 heads, 2 key heads), float32, in eval mode. Token 0 ends a sequence."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        attention_bias=attention_bias,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _random(LlamaForCausalLM(config), seed)


def tiny_gpt2(seed: int = 0, vocab: int = 64, hidden: int = 32, layers: int = 2, context: int = 256) -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers store their weights as [in, out]; float32, in eval mode, tied head."""
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=context,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _random(GPT2LMHeadModel(config), seed)


def fine_tuned(model: Model, seed: int = 1, scale: float = 0.02) -> Model:
    """A copy with normal noise of standard deviation ``scale`` added to every parameter; a tied pair stays tied."""
    generator = torch.Generator().manual_seed(seed)
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return copy


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB", vocab: int | None = None) -> Path:
    """Write an ordinary checkpoint folder; ``vocab`` puts a tokenizer of that many tokens beside it."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if vocab is not None:
        tiny_tokenizer(vocab).save_pretrained(folder)
    return folder


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    """One token a character, with a chat template.

    Tokens 0 and 1 are ``<|end|>`` and ``<|start|>``. A vocabulary of 258 or more is byte-level: every text survives it.
    A smaller one knows as many of ``a-z``, blank, ``:``, ``.``, newline, ... as fit, and drops other characters.
    """
    special = ["<|end|>", "<|start|>"]
    characters = sorted(pre_tokenizers.ByteLevel.alphabet()) if vocab >= 258 else list(_SMALL_ALPHABET)
    tokens = (special + characters)[:vocab]
    tokens += [f"<|spare{i}|>" for i in range(len(tokens), vocab)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    if vocab >= 258:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[1], chat_template=CHAT_TEMPLATE
    )


_SMALL_ALPHABET = "abcdefghijklmnopqrstuvwxyz :.\n,?!'-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _random(model: Model, seed: int) -> Model:
    """Weights large enough that different inputs give clearly different logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            parameter.copy_(is_norm + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
