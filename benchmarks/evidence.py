"""What the benchmarks of compression share: a fine-tune on its bench, and a results file that grows row by row."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

HERE = Path(__file__).parent
DEMO = HERE.parent / "deploy" / "demo"
sys.path.insert(0, str(DEMO))

from artifacts import setup_row, write_examples  # noqa: E402
from base import base_folder  # noqa: E402
from corpora import load  # noqa: E402

from deltaserve.delta_store.artifact_file import ArtifactFile, Parts, is_weighted  # noqa: E402
from deltaserve.delta_store.calibration import profile_for  # noqa: E402
from deltaserve.delta_store.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from deltaserve.delta_store.codec.artifact import Artifact  # noqa: E402
from deltaserve.delta_store.encoding import Known, encode_parts, facts_of  # noqa: E402
from deltaserve.delta_store.fine_tune import FineTune, open_fine_tune  # noqa: E402
from deltaserve.delta_store.fingerprint import fingerprint  # noqa: E402
from deltaserve.delta_store.profile import Profile  # noqa: E402
from deltaserve.delta_store.pruning.methods import METHODS, Method  # noqa: E402
from deltaserve.delta_store.pruning.options import Options, Value  # noqa: E402
from deltaserve.delta_store.selection.bench import Bench  # noqa: E402
from deltaserve.delta_store.selection.journal import Point  # noqa: E402
from deltaserve.delta_store.text import Sample, read_samples, tokenizer_of  # noqa: E402

CORPUS = {
    "scripture": "scripture",
    "scripture-large": "scripture",
    "scripture-adamr": "scripture",
    "python": "python",
    "python-long": "python",
}
"""The text of each full fine-tune that is measured."""

ADAPTERS = {"scripture-lora": "scripture"}

EXAMPLES = 200
"""Of a split, at the most."""

Row = dict[str, Any]


class Rows:
    """A results file. Each row is on disk before the next is measured, and none is measured twice."""

    def __init__(self, name: str, command: str) -> None:
        self.path = HERE / "results" / f"{name}.jsonl"
        if not self.path.exists():
            self.path.write_text(json.dumps(setup_row(command)) + "\n")
        self.rows: list[Row] = [json.loads(line) for line in self.path.read_text().splitlines()]

    def find(self, **key: Value) -> Row | None:
        """The row that has all of these values."""
        return next((row for row in self.rows if all(row.get(k) == v for k, v in key.items())), None)

    def once(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row of this key: from the file, or measured and appended."""
        if (known := self.find(**key)) is not None:
            return known
        row = {**key, **measure()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def end(self, goals: list[Row]) -> None:
        """Put the goals at the end, in the place of those of an earlier run."""
        self.rows = [row for row in self.rows if row["row"] != "goal"] + goals
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))


class Subject:
    """A fine-tune of the demo base, in memory beside it, with text: ``held_out`` to judge on, ``calibration`` to tune.

    ``linears`` are the weights that methods prune. Takes the memory of five models in float32, so that a point needs no
    reading of checkpoints: a third of its time.
    """

    def __init__(self, name: str, folder: Path, held_out_tokens: int, calibration_tokens: int) -> None:
        """``folder`` holds the fine-tunes of ``CORPUS``, by name."""
        self.name = name
        self.base = open_checkpoint(base_folder())
        self.fine_tune = in_memory(open_fine_tune(folder / name, self.base))
        self.held_out = _samples(name, "test", held_out_tokens, self.base)
        self.calibration = _samples(name, "calibration", calibration_tokens, self.base)
        self.bench = Bench(self.base, self.fine_tune)
        self.embeddings = facts_of(self.base.architecture, None).embeddings
        self._kept_embeddings: dict[tuple[int, str], Known] = {}
        self.weights = {name: self.base.read(name).float() for name in self.base.names}
        self.fine = {name: self.fine_tune.read(name).float() for name in self.fine_tune.names}
        self.linears = [n for n, t in self.fine.items() if t.dim() == 2 and n not in self.embeddings]

    def delta(self, name: str) -> Tensor:
        return self.fine[name] - self.weights[name]

    def variant(self, decode: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """All parameters with the deltas of linear weights as ``decode`` gives them, the others as fine-tuned."""
        for name, tensor in self.fine.items():
            yield name, self.weights[name] + decode(name) if name in self.linears else tensor

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.base)

    @cached_property
    def profile(self) -> Profile:
        """The demo's, made from the bare base on Python's documentation."""
        return profile_for(self.base, self.fingerprint, None, DEMO / "profile.safetensors")

    @cached_property
    def of_base(self) -> Point:
        point = self.bench.base(self.held_out)
        assert point is not None, "the demo's fine-tunes add no tokens"
        return point

    @contextmanager
    def artifact(self, method: str, options: Mapping[str, Value]) -> Iterator[tuple[Artifact, Profile | None]]:
        """The fine-tune under a method that tunes nothing, in a file; and the profile that it needs."""
        chosen = METHODS[method]
        settings = chosen.options(options)
        facts = facts_of(self.base.architecture, self.profile if chosen.needs_profile else None)
        kept = (settings.rank, settings.embedding_codec)
        known = self._kept_embeddings.get(kept, {})
        parts = encode_parts(chosen, settings, self.base, self.fine_tune, facts, known=known)
        self._kept_embeddings[kept] = {n: [part for part in parts if part[0] == n] for n in self.embeddings}
        with self.artifact_of(parts, chosen, settings) as written:
            yield written

    @contextmanager
    def artifact_of(self, parts: Parts, chosen: Method, settings: Options) -> Iterator[tuple[Artifact, Profile | None]]:
        """A file of these parts, and the profile that it needs."""
        profile = self.profile if is_weighted(parts) else None
        out = Path(tempfile.gettempdir()) / f"{self.name}.safetensors"
        file = ArtifactFile(out, self.base, self.fine_tune, self.fingerprint, profile, chosen, settings, ())
        with file.draft(parts) as artifact:
            yield artifact, profile

    def measure(self, method: str, options: Mapping[str, Value]) -> Row:
        """The row of a method's artifact."""
        with self.artifact(method, options) as (artifact, profile):
            return self.row(self.bench.measure(artifact, profile, self.held_out))

    def measure_tensors(self, tensors: Iterator[tuple[str, Tensor]], size_bytes: int = 0) -> Row:
        """The row of a variant given by all of its parameters."""
        return self.row(self.bench.measure_tensors(tensors, size_bytes, self.held_out))

    def row(self, point: Point) -> Row:
        """A point's figures on held-out text, beside the base's. ``bytes`` are the whole variant's."""
        gain = self.of_base.loss - point.loss_fine_tuned
        size = {"bytes": point.bytes, "ratio": 2 * self.fine_tune.parameters / point.bytes} if point.bytes else {}
        return size | {
            "kl": point.kl,
            "relative_kl": point.kl / self.of_base.kl,
            "gain_kept": (self.of_base.loss - point.loss) / gain,
            "top1_agreement": point.agreement,
        }

    def about(self) -> Row:
        """The fine-tune itself: how large its delta is, what it gained over the base, how much text is looked at."""
        squares = sum(self.delta(name).double().square().sum().item() for name in self.linears)
        return {
            "delta_std": (squares / sum(self.fine[name].numel() for name in self.linears)) ** 0.5,
            "kl_base": self.of_base.kl,
            "loss_base": self.of_base.loss,
            "loss_fine_tuned": self.of_base.loss_fine_tuned,
            "held_out_tokens": self.of_base.tokens,
            "parameters": self.fine_tune.parameters,
        }


def in_memory(fine_tune: FineTune) -> FineTune:
    """The same, of which each change is read once."""
    changes = list(fine_tune.changes())
    return replace(fine_tune, changes=lambda: iter(changes))


def _samples(name: str, split: str, tokens: int, base: Checkpoint) -> list[Sample]:
    with tempfile.TemporaryDirectory() as folder:
        file = write_examples(load((CORPUS | ADAPTERS)[name])[split][:EXAMPLES], Path(folder) / "text.jsonl")
        return read_samples(file, tokenizer_of(base.folder), tokens)


def goal(name: str, value: float | None, limit: float, better: str, unit: str, **more: Any) -> Row:
    """A goal's row, met or not."""
    return {"row": "goal", "name": name, "value": value, "limit": limit, "better": better, "unit": unit, **more}
