"""Where the base is put, and what is said of a device or backend that is not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch_flash
from engine_variants import SMALL
from tiny_encoders import save_encoder, tiny_encoder
from tiny_models import save, tiny_llama
from torch import Tensor

from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels import dispatch
from deltaserve.server.engine import flash
from deltaserve.server.engine.device import choose
from deltaserve.server.engine.encoder import EncoderEngine
from deltaserve.server.engine.engine import Engine

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@no_gpu
def test_auto_is_the_cpu_and_its_fastest_kernels() -> None:
    assert choose("auto", "auto") == (torch.device("cpu"), dispatch.backend())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_is_the_gpu_unless_a_backend_for_the_cpu_is_named() -> None:
    device, kernels = choose("auto", "auto")
    assert (device.type, kernels.NAME) == ("cuda", "triton")
    assert choose("auto", "reference")[0].type == "cpu"


@no_gpu
def test_a_gpu_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^Device 'cuda' is not there: .*; use device cpu or auto$"):
        Engine(save(tiny_llama(), tmp_path, vocab=64), limits=replace(SMALL, device="cuda"))


def test_unknown_names_and_pairs_that_do_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="Unknown device 'tpu'; known are auto, cpu, cuda"):
        choose("tpu", "auto")
    with pytest.raises(OptionError, match=r"Unknown kernel backend 'fast'; known are: auto, .*, triton"):
        choose("cpu", "fast")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(OptionError, match="Backend 'reference' runs on cpu, and the base would be on cuda"):
        choose("cuda", "reference")


def test_encoders_stay_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Encoders run on the CPU"):
        EncoderEngine(save_encoder(tiny_encoder(), tmp_path), limits=replace(SMALL, device="cuda"))


def test_without_a_gpu_flash_attention_is_never_taken() -> None:
    assert flash.implementation(tiny_llama().bfloat16()) is None


def test_a_flash_kernel_is_fit_only_if_it_gives_what_torchs_attention_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    torch_flash.register(monkeypatch)
    assert flash.unfit(model, torch_flash.NAME) is None
    assert "is not for LlamaForCausalLM in torch.float32" in str(flash.unfit(tiny_llama(), torch_flash.NAME))

    def wrong(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return torch_flash.flash_attn_func(q, k.roll(1, 1), v, causal=True)

    torch_flash.register(monkeypatch, wrong)
    assert "logits with torch_flash_attention_2 differ from torch's by" in str(flash.unfit(model, torch_flash.NAME))
    assert "does not run" in str(flash.unfit(model, "flash_attention_2"))
    assert model.config._attn_implementation == "sdpa"
