"""From the fine-tunes that ``train.py`` made to the committed artifacts: ``python deploy/demo/build.py FOLDER``.

FOLDER holds one checkpoint a variant. Each is compressed with the same options; held-out loss of the answers (and, for
``sentiment``, accuracy) is measured for base, full fine-tune and artifact and written to benchmarks/results/demo.jsonl.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from base import base_folder
from corpora import CORPORA, Example, load
from tqdm import tqdm
from train import answer_loss, batch_of, encode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.profile import Profile
from deltaserve.kernels.reference import swap_in_, swap_out_

HERE = Path(__file__).parent
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "demo.jsonl"
OPTIONS = ["--method", "weighted", "--drop", "0.98", "--codec", "int2", "--block", "16", "--seed", "0"]
EXAMPLES = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    rows: list[dict[str, Any]] = [setup_row()]
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
    for name in CORPORA:
        if (args.folder / name).exists():
            artifact = compress(args.folder / name, name)
            examples = load(name)["test"][:EXAMPLES]
            rows.append(measure_variant(name, base, args.folder / name, artifact, tokenizer, examples))
            print(json.dumps(rows[-1]))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def compress(fine_tuned: Path, name: str) -> Path:
    artifact = HERE / "variants" / f"{name}.safetensors"
    artifact.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "deltaserve.server.cli", "compress", str(base_folder()), str(fine_tuned)]
    subprocess.run(
        [*command, "-o", str(artifact), *OPTIONS, "--profile", str(HERE / "profile.safetensors")], check=True
    )
    return artifact


def measure_variant(
    name: str,
    base: PreTrainedModel,
    fine_tuned: Path,
    artifact: Path,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
) -> dict[str, Any]:
    """Held-out figures of base, full fine-tune and artifact, on the same examples."""
    full = AutoModelForCausalLM.from_pretrained(fine_tuned, dtype=torch.float32).eval()
    row: dict[str, Any] = {"row": "variant", "name": name, "options": OPTIONS, "examples": len(examples)}
    row["bytes"] = artifact.stat().st_size
    row["checkpoint_bytes_16_bit"] = 2 * sum(parameter.numel() for parameter in base.parameters())
    row["times_smaller"] = round(row["checkpoint_bytes_16_bit"] / row["bytes"], 1)
    row["base"] = measure(base, tokenizer, examples, name)
    row["full"] = measure(full, tokenizer, examples, name)
    with applied(base, artifact):
        row["artifact"] = measure(base, tokenizer, examples, name)
    losses = [row[model]["loss"] for model in ("base", "full", "artifact")]
    row["loss_gain_kept"] = round((losses[0] - losses[2]) / (losses[0] - losses[1]), 4)
    return row


@contextmanager
def applied(model: PreTrainedModel, artifact_path: Path) -> Iterator[None]:
    """The artifact's deltas in the model's weights, and out again."""
    artifact = open_artifact(artifact_path)
    profile = Profile.open(HERE / "profile.safetensors")
    weights = dict(model.named_parameters())
    tokens = {
        name: swap_in_(weights[name].data, artifact.delta(name, profile, weights[name].data)) for name in artifact.names
    }
    try:
        yield
    finally:
        for name, token in tokens.items():
            swap_out_(weights[name].data, token)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example], name: str
) -> dict[str, float]:
    """Mean held-out loss (nats an answer token); for one-word answers also the accuracy of greedy decoding."""
    total = count = 0.0
    for start in tqdm(range(0, len(examples), 8), desc=f"{name}: held-out loss", mininterval=5):
        batch = batch_of([encode(tokenizer, example) for example in examples[start : start + 8]])
        answers = int((batch[2][:, 1:] != -100).sum())
        total += float(answer_loss(model, batch)) * answers
        count += answers
    figures = {"loss": round(total / count, 4)}
    if name == "sentiment":
        figures["accuracy"] = round(accuracy(model, tokenizer, examples), 4)
    return figures


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> float:
    """Share of examples whose greedy answer names the right word first and not the other."""
    right = 0
    for example in tqdm(examples, desc="accuracy", mininterval=5):
        ids, prompt = encode(tokenizer, example)
        answer = model.generate(torch.tensor([ids[:prompt]]), max_new_tokens=12, do_sample=False)[0, prompt:]
        text = tokenizer.decode(answer).lower()
        found = sorted((text.find(word), word) for word in ("positive", "negative") if word in text)
        right += bool(found) and found[0][1] == example.answer
    return right / len(examples)


def setup_row() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "row": "setup",
        "command": "python deploy/demo/build.py FOLDER",
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    open_checkpoint(base_folder())  # fail early if the base cannot be read
    main()
