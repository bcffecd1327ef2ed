"""``deltaserve compress`` with a tolerance of each kind, on real fine-tunes: ``python benchmarks/search.py FOLDER``.

FOLDER holds ``scripture`` and ``sentiment`` (deploy/demo/train.py makes them). Calibration text and tasks are of the
calibration split; the search holds out a third of it. Adds a row to results/search.jsonl with the command's own
receipt; what is there is not run again. Times are of the cores that OMP_NUM_THREADS leaves it.
"""

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from evidence import Row, Rows

from artifacts import base_folder, deltaserve, write_examples  # isort: skip
from corpora import load  # isort: skip

EXAMPLES, TASK_EXAMPLES = 300, 90
"""Of the calibration split. A task's prompts are all read for a few tokens of answer, so there are fewer."""
SEARCHES = (
    ("scripture", "--max-kl 2%"),
    ("scripture", "--bytes 400000"),
    ("scripture", "--min-agreement 0.95 --method weighted"),
    ("sentiment", "--min-score 0.75 --method weighted --block 16"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--searches", nargs="+", type=int, default=range(len(SEARCHES)), help="by number")
    args = parser.parse_args()
    rows = Rows("search", "python benchmarks/search.py FOLDER")
    for number in args.searches:
        variant, tolerance = SEARCHES[number]
        text = "--task" if "--min-score" in tolerance else "--calibration"
        command = f"deltaserve compress BASE FOLDER/{variant} -o FILE {tolerance} {text} calibration.jsonl --json"
        key = {"row": "search", "variant": variant, "command": command}
        rows.once(key, partial(search, args.folder / variant, tolerance, text))


def search(fine_tuned: Path, tolerance: str, text: str) -> Row:
    """The receipt of one search, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        examples = load(fine_tuned.name)["calibration"][: TASK_EXAMPLES if text == "--task" else EXAMPLES]
        calibration = write_examples(examples, Path(folder) / "calibration.jsonl")
        out = Path(folder) / f"{fine_tuned.name}.safetensors"
        start = time.monotonic()
        words = ("compress", base_folder(), fine_tuned, "-o", out, *tolerance.split(), text, calibration, "--json")
        receipt = json.loads(deltaserve(*words))
        seconds = round(time.monotonic() - start)
    receipt.pop("path")
    selection = receipt["selection"]
    selection |= {name: Path(selection[name]).name for name in ("journal", "plot")}
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    return {"cores": cores, "seconds": seconds, "points": selection["tried"], **receipt}


if __name__ == "__main__":
    main()
