"""The laboratory: makes a candidate's file, has it measured on a text, and writes down what came out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deltaserve.delta_store.artifact_file import ArtifactFile, Parts, is_weighted
from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.encoding import Known, encode_parts, facts_of
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.pruning.methods import method
from deltaserve.delta_store.pruning.tuning import divided
from deltaserve.delta_store.selection.bench import Bench
from deltaserve.delta_store.selection.candidate import Candidate
from deltaserve.delta_store.selection.journal import Journal, Point
from deltaserve.delta_store.selection.search import CALIBRATION
from deltaserve.delta_store.text import Sample

BASE = "base"


@dataclass(frozen=True, slots=True, eq=False)
class Laboratory:
    """Everything that candidates of one fine-tune share. ``done`` is called after each that was measured.

    ``embeddings``, by rank and codec, are encoded once: all methods that prune linear weights have the same ones.
    """

    out: Path
    base: Checkpoint
    base_fingerprint: str
    fine_tune: FineTune
    profile: Profile | None
    texts: Mapping[str, Sequence[Sample]]
    journal: Journal
    bench: Bench
    done: Callable[[], None] = lambda: None
    embeddings: dict[tuple[int, str], Known] = field(default_factory=dict)

    def point(self, candidate: Candidate, text: str) -> Point:
        """From the journal, or measured: encoded, written to a draft, and decoded from it as a server would."""
        if known := self.journal.points.get((candidate.key, text)):
            return known
        parts = self.parts(candidate)
        file = self.file(candidate, parts)
        with file.draft(parts) as artifact:
            point = self.bench.measure(artifact, file.profile, self.texts[text])
        self.journal.add(candidate.key, text, point)
        self.done()
        return point

    def of_base(self, text: str) -> Point | None:
        """The bare base's; None where it lacks tokens of the fine-tune."""
        if known := self.journal.points.get((BASE, text)):
            return known
        point = self.bench.base(self.texts[text])
        if point is not None:
            self.journal.add(BASE, text, point)
        return point

    def parts(self, candidate: Candidate) -> Parts:
        """What stands for the fine-tune under this candidate."""
        chosen = method(candidate.method)
        options = chosen.options(dict(candidate.settings))
        facts = facts_of(self.base.architecture, self.profile)
        kept = (options.rank, options.embedding_codec)
        known = self.embeddings.get(kept, {}) if "rank" in chosen.defaults else {}
        parts = encode_parts(chosen, options, self.base, self.fine_tune, facts, known=known)
        if "rank" in chosen.defaults:
            self.embeddings[kept] = {n: [part for part in parts if part[0] == n] for n in facts.embeddings}
        if chosen.tune and "judge" not in chosen.defaults:  # of those with a judge the search itself finds q
            with self.file(candidate, parts).draft(parts) as draft:
                samples = self.texts[CALIBRATION]
                tuned = chosen.tune(self.base, self.fine_tune, draft, samples, options, self.bench.runner)
                return divided(parts, tuned)
        return parts if candidate.q == 1 else divided(parts, {name: candidate.q for name, _, _ in parts})

    def file(self, candidate: Candidate, parts: Parts, warnings: tuple[str, ...] = ()) -> ArtifactFile:
        """Where the artifact of ``parts`` goes, and all that is in it beside them."""
        chosen = method(candidate.method)
        options = chosen.options(dict(candidate.settings))
        needed = self.profile if is_weighted(parts) else None
        return ArtifactFile(
            self.out, self.base, self.fine_tune, self.base_fingerprint, needed, chosen, options, warnings, candidate.q
        )
