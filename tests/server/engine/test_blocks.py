"""Which models' decoder layers are computed at once: those that compute what the kernel computes, and no others."""

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import modeling_llama

from deltaserve.kernels import dispatch
from deltaserve.server.engine.routing import Routing
from deltaserve.server.engine.wrapped import WrappedModel

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def is_stacked(model: torch.nn.Module, *, backend: str = "auto", kept: str = "plain") -> bool:
    return WrappedModel(model.eval(), Routing(), 2, dispatch.backend(backend), tied=False, kept=kept).is_stacked


@pytest.mark.skipif(dispatch.backend().NAME == "reference", reason="needs the compiled kernels")
def test_llama_and_its_relatives_are_stacked():
    assert is_stacked(tiny_llama())
    assert is_stacked(tiny_llama(), kept="int8")
    assert is_stacked(Qwen2ForCausalLM(Qwen2Config(**SMALL)))  # biases of query, key and value


def test_models_of_another_kind_are_not():
    assert not is_stacked(tiny_gpt2())
    assert not is_stacked(Qwen3ForCausalLM(Qwen3Config(**SMALL)))  # norms of queries and keys
    assert not is_stacked(tiny_llama().bfloat16())
    assert not is_stacked(tiny_llama(), backend="reference")
    assert not is_stacked(tiny_llama(), kept="packed")


class Halved(modeling_llama.LlamaDecoderLayer):
    """A layer with the parts of Llama's that adds half of what its sublayers say."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + (super().forward(hidden_states, *args, **kwargs) - hidden_states) / 2


def test_a_layer_with_the_same_parts_that_computes_something_else_is_not():
    model = tiny_llama()
    model.model.layers[1].__class__ = Halved
    assert not is_stacked(model)


def test_a_layer_without_positions_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda query, key, cos, sin: (query, key))
    assert not is_stacked(tiny_llama())
