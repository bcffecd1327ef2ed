"""A GGUF file is read through transformers, converted once, and opens as an ordinary checkpoint folder."""

from pathlib import Path

import pytest
import torch
from merged_models import logits
from tiny_models import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from deltaserve.delta_store import gguf as gguf_reader
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.errors import CheckpointError

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """The model as llama.cpp stores it: other names, and query and key rows interleaved for its rotation."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "<|endoftext|>", *(f"<{i}>" for i in range(4, config.vocab_size))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        value = _interleaved(value, heads[part]) if part in heads else value
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width).contiguous()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_opens_as_an_ordinary_folder(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    (tmp_path / "gguf").mkdir()
    file = write_gguf(model, tmp_path / "gguf" / "tiny.gguf")
    checkpoint = open_checkpoint(file)
    assert checkpoint.tied == tied
    assert set(checkpoint.names) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.read(name), parameter)
    assert open_checkpoint(file.parent).folder == checkpoint.folder
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=0)
    assert len(AutoTokenizer.from_pretrained(checkpoint.folder)) == 64


def test_two_gguf_files_in_a_folder_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="name one of them"):
        open_checkpoint(tmp_path)


def test_a_damaged_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"GGUF but nothing more")
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        open_checkpoint(file)
    assert list((tmp_path / "cache").rglob("*.partial")) == []


def test_without_its_package_the_install_command_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(gguf_reader, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'deltaserve\[gguf\]'"):
        open_checkpoint(file)
