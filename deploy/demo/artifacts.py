"""From the fine-tunes that ``train.py`` made to the committed artifacts: ``python deploy/demo/artifacts.py FOLDER``.

FOLDER holds one checkpoint a variant. Each is compressed with the method's defaults and measured on held-out examples;
the report is in the artifact, and with the accuracy of ``sentiment`` in benchmarks/results/demo.jsonl.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from base import base_folder
from corpora import CORPORA, Example, load
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
PROFILE = HERE / "profile.safetensors"
RESULTS = HERE.parent.parent / "benchmarks" / "results" / "demo.jsonl"
EXAMPLES = 300
"""Held-out examples at the most; those with long answers fill the evaluation sooner."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--variants", nargs="+", default=list(CORPORA), choices=list(CORPORA), help="rebuild only these"
    )
    args = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    rows = {}
    if RESULTS.exists():
        rows = {row.get("name", "setup"): row for row in map(json.loads, RESULTS.read_text().splitlines())}
    rows["setup"] = setup_row("python deploy/demo/artifacts.py FOLDER")
    for name in args.variants:
        rows[name] = build(name, args.folder / name)
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


def build(name: str, fine_tuned: Path) -> dict[str, Any]:
    """Write the variant's artifact; the row of its figures."""
    examples = load(name)["test"][:EXAMPLES]
    artifact = HERE / "variants" / f"{name}.safetensors"
    artifact.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        held_out = write_examples(examples, Path(folder) / "held-out.jsonl")
        receipt = compress(fine_tuned, artifact, "--profile", PROFILE, "--evaluate", held_out)
        row = {"row": "variant", "name": name, **{key: receipt[key] for key in KEPT}, **receipt["quality"]}
        if name == "sentiment":
            merged = Path(folder) / "merged"
            deltaserve("merge", base_folder(), artifact, "-o", merged, "--profile", PROFILE)
            models = {"base": base_folder(), "fine_tuned": fine_tuned, "artifact": merged}
            for model, checkpoint in models.items():
                row[f"accuracy_{model}"] = accuracy(checkpoint, examples)
    print(json.dumps(row, indent=2))
    return row


KEPT = ("method", "size_bytes", "full_bytes", "ratio")


def compress(fine_tuned: Path, artifact: Path, *options: str | Path) -> dict[str, Any]:
    """Run ``deltaserve compress`` against the demo base; its receipt."""
    receipt: dict[str, Any] = json.loads(
        deltaserve("compress", base_folder(), fine_tuned, "-o", artifact, "--json", *options)
    )
    return receipt


def deltaserve(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "deltaserve.server.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def write_examples(examples: list[Example], path: Path) -> Path:
    """As ``--evaluate`` and ``--calibration`` read them: a line of JSON each."""
    path.write_text("".join(json.dumps(example._asdict()) + "\n" for example in examples))
    return path


def accuracy(checkpoint: Path, examples: list[Example]) -> float:
    """Share of examples whose greedy answer names the right word first."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    answers = (answer(model, tokenizer, e.prompt) for e in tqdm(examples, desc=f"accuracy {checkpoint.name}"))
    return sum(named == example.answer for named, example in zip(answers, examples, strict=True)) / len(examples)


def answer(model: Any, tokenizer: Any, prompt: str) -> str | None:
    """Which of the two words a greedy answer names first, None if neither."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    named = re.search("positive|negative", tokenizer.decode(generated).lower())
    return named.group() if named else None


def setup_row(command: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "row": "setup",
        "command": command,
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
