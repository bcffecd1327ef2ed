"""DAREx on the factors of a LoRA adapter, or on their product: ``python benchmarks/lora.py FOLDER``.

FOLDER holds ``scripture-lora`` (``deploy/demo/train.py scripture FOLDER/scripture-lora --lora 16``). Each method prunes
at several p, unbiased (q = 1 - p); relative KL is that to the merged adapter over that of the base. Writes
results/lora.jsonl, row by row; an interrupted run goes on where it stopped.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from evidence import Rows, Subject
from tqdm import tqdm

from deltaserve.delta_store.pruning.options import Value

NAME = "scripture-lora"
HELD_OUT_TOKENS = 768
SETTINGS: dict[str, tuple[str, dict[str, Value]]] = {
    "factors exactly": ("lora", {}),
    **{f"factors, p={p} {c}": ("lora-darex", {"drop": p, "codec": c}) for p, c in ((0.0, "int4"), (0.0, "int2"))},
    **{f"factors, p={p} int4": ("lora-darex", {"drop": p, "codec": "int4"}) for p in (0.25, 0.5)},
    **{f"product, p={p} V=1 int4": ("dare", {"drop": p, "block": 1, "codec": "int4"}) for p in (0.95, 0.98)},
    **{f"product, weighted p={p} V=16 int2": ("weighted", {"drop": p}) for p in (0.95, 0.98)},
    "product, SVD r=4 int8": ("low-rank", {"linear_rank": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = Rows("lora", "python benchmarks/lora.py FOLDER")
    subject = Subject(NAME, args.folder, HELD_OUT_TOKENS, 0)
    rows.once({"row": "fine-tune", "variant": NAME}, subject.about)
    for name, (method, options) in tqdm(SETTINGS.items()):
        key = {"row": "setting", "variant": NAME, "setting": name}
        rows.once(key, partial(subject.measure, method, options))


if __name__ == "__main__":
    main()
