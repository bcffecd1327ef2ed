"""How much of a fine-tune an artifact keeps: its predictions beside those of the full fine-tune, on given text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaserve.delta_store.checkpoint import Checkpoint
from deltaserve.delta_store.codec.artifact import Artifact
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import FineTune
from deltaserve.delta_store.profile import Profile
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.running.weights import ModelWeights, of_artifact, of_base, of_fine_tune
from deltaserve.delta_store.text import Sample

EVALUATION_TOKENS = 4096
"""As many scored tokens as are looked at: enough to know their mean KL to a few percent."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Measured in float32 over ``tokens`` predicted tokens, in nats; over texts where texts are classified.

    ``kl_mean`` and ``kl_p99``: Kullback-Leibler divergence of the artifact's predictions from the full fine-tune's.
    ``top1_agreement``: how often both put the same token first. ``loss_*``: cross-entropy of the text. ``gain_kept``:
    the share of what fine-tuning gained in loss; None where it gained nothing on this text. ``*_base``: the bare
    base's; None where the text holds tokens that only the fine-tune has, or the base does not classify.
    """

    tokens: int
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    loss_base: float | None
    loss_fine_tuned: float
    loss_artifact: float
    gain_kept: float | None
    kl_base: float | None
    top1_agreement_base: float | None


def check_answers(path: Path, samples: Sequence[Sample], fine_tune: FineTune) -> None:
    """Refuse text that asks of a model what it cannot answer: tokens of a classifier, or classes of a decoder."""
    architecture = fine_tune.architecture
    is_classifier = _classifies(fine_tune)
    classes = architecture.config.num_labels if is_classifier else 0
    labels = {sample.label for sample in samples}
    if None in labels and architecture.head is None:
        wanted = 'lines of {"text": ..., "label": ...}' if is_classifier else "a fine-tune that classifies"
        raise OptionError(f"{architecture.name} predicts no tokens; to evaluate it takes {wanted}")
    if wrong := sorted(label for label in labels if label is not None and label >= classes):
        raise OptionError(f"{path} has label {wrong[0]}, but {architecture.name} has {classes} classes")


def predicts_tokens(fine_tune: FineTune) -> bool:
    """Whether it is a language model: it has a head over the vocabulary, and classifies no texts."""
    return fine_tune.architecture.head is not None and not _classifies(fine_tune)


def _classifies(fine_tune: FineTune) -> bool:
    return fine_tune.architecture.name.endswith("ForSequenceClassification")


class Judge:
    """The full fine-tune's predictions on some text, beside which artifacts are put.

    Takes what ``runner`` does, and 4 bytes for each scored token and word of the vocabulary. ``progress`` counts for
    each model that is run.
    """

    def __init__(
        self,
        base: Checkpoint,
        fine_tune: FineTune,
        samples: Sequence[Sample],
        runner: Runner,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._base, self._samples, self._runner, self._progress = base, samples, runner, progress
        found = self._runner.run(of_fine_tune(fine_tune), samples, outputs, progress)
        self._wanted = dict(zip(samples, found, strict=True))
        predicts = _base_predicts(base, fine_tune, samples)
        self._of_base = self._compared(of_base(base)) if predicts else None

    def quality(self, artifact: Artifact, profile: Profile | None) -> Quality:
        """What the artifact keeps."""
        return quality_of(self._compared(of_artifact(self._base, artifact, profile)), self._of_base)

    def _compared(self, weights: ModelWeights) -> Tensor:
        return torch.cat(self._runner.run(weights, self._samples, self._beside_wanted, self._progress), 1)

    def _beside_wanted(self, model: Any, sample: Sample) -> Tensor:
        wanted, given = self._wanted[sample], outputs(model, sample)
        missing = wanted.shape[1] - given.shape[1]  # tokens that the base lacks: to it they are impossible
        return compare(wanted, pad(given, (0, missing), value=-inf) if missing else given, targets(sample))


def quality_of(rows: Tensor, base: Tensor | None) -> Quality:
    """The report of what ``compare`` gave for all tokens, for an artifact and for the bare base."""
    divergence, agreement, loss_fine_tuned, loss = rows.double()
    divergence_base, agreement_base, _, loss_base = (None,) * 4 if base is None else base.double().mean(1).tolist()
    return Quality(
        tokens=len(divergence),
        kl_mean=divergence.mean().item(),
        kl_p99=divergence.quantile(0.99).item(),
        top1_agreement=agreement.mean().item(),
        loss_base=loss_base,
        loss_fine_tuned=loss_fine_tuned.mean().item(),
        loss_artifact=loss.mean().item(),
        gain_kept=gain_kept(loss_base, loss_fine_tuned.mean().item(), loss.mean().item()),
        kl_base=None if divergence_base == inf else divergence_base,
        top1_agreement_base=agreement_base,
    )


def gain_kept(base: float | None, fine_tuned: float, loss: float) -> float | None:
    """Which share of what fine-tuning gained in loss is kept; None where it gained nothing on this text."""
    gained = 0.0 if base is None else base - fine_tuned
    return (base - loss) / gained if base is not None and gained > 0 else None


def outputs(model: Any, sample: Sample) -> Tensor:
    """float32 ``[tokens, vocabulary]``: log-probabilities of what may stand at each scored token.

    Of a text with a label ``[1, labels]``, those of its classes. Of a model that predicts no tokens, an encoder, on
    other text: its last hidden state at each token, ``[tokens, width]``.
    """
    ids = torch.tensor([sample.ids])
    if sample.label is not None:
        classes: Tensor = model(input_ids=ids).logits
        return classes.float().log_softmax(-1)
    if model.get_output_embeddings() is None:
        hidden: Tensor = model.base_model(input_ids=ids)[0][0, sample.start :]
        return hidden.float()
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, sample.start - 1 : -1]
    return logits.float().log_softmax(-1)


def output_change(given: Sequence[Tensor], wanted: Sequence[Tensor], *, of_states: bool = False) -> float:
    """How far ``outputs`` are from those that another model gave on the same samples: the mean KL divergence, in nats.

    Of hidden states: the sum of squared differences over the sum of squares.
    """
    pairs = list(zip(given, wanted, strict=True))
    if of_states:
        changes = [(g - w).square().sum() for g, w in pairs]
        return (torch.stack(changes).sum() / torch.stack([w.square().sum() for w in wanted]).sum()).item()
    return torch.cat([_divergence(w, g) for g, w in pairs]).double().mean().item()


def loss(given: Sequence[Tensor], samples: Sequence[Sample]) -> float:
    """Mean cross-entropy of the scored tokens, in nats, from the ``outputs`` of each sample."""
    losses = [-scores.gather(1, targets(sample)[:, None])[:, 0] for scores, sample in zip(given, samples, strict=True)]
    return torch.cat(losses).double().mean().item()


def compare(wanted: Tensor, given: Tensor, targets: Tensor) -> Tensor:
    """float32 ``[4, tokens]``: divergence, agreement, both losses, from log-probabilities ``[tokens, vocabulary]``."""
    agreement = wanted.argmax(1) == given.argmax(1)
    losses = [-scores.gather(1, targets[:, None])[:, 0] for scores in (wanted, given)]
    return torch.stack([_divergence(wanted, given), agreement.float(), *losses])


def _divergence(wanted: Tensor, given: Tensor) -> Tensor:
    return (wanted.exp() * (wanted - given)).sum(1)


def _base_predicts(base: Checkpoint, fine_tune: FineTune, samples: Sequence[Sample]) -> bool:
    """Whether the bare base can predict what the fine-tune does."""
    vocabulary = base.shape(base.architecture.embedding)[0]
    has_tokens = all(token < vocabulary for sample in samples for token in sample.ids)
    return has_tokens and base.architecture.name == fine_tune.architecture.name


def targets(sample: Sample) -> Tensor:
    """int64 ``[tokens]``: the ids that are scored; of a text with a label that one, ``[1]``."""
    return torch.tensor(sample.ids[sample.start :] if sample.label is None else [sample.label])
