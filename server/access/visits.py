"""A request that makes the model work, from the check of its key until its end: limits, usage, metrics, trace."""

from asyncio import CancelledError
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING

from fastapi import Request

from deltaserve.delta_store.errors import GenerationFailed, NotPermitted
from deltaserve.server.access.keys import Key, KeyStore, Limits
from deltaserve.server.access.rates import Rates, Subject
from deltaserve.server.access.usage import Ledger, Used
from deltaserve.server.api.admission import Answer
from deltaserve.server.api.choice import Choice
from deltaserve.server.metrics import Metrics

if TYPE_CHECKING:
    from deltaserve.server.settings import Settings
    from deltaserve.server.tracing import Tracing


@dataclass(frozen=True, slots=True)
class Visits:
    """Who may come in, and where what they did is written down. ``tracing`` None records no traces."""

    keys: KeyStore
    rates: Rates
    ledger: Ledger
    metrics: Metrics
    settings: "Settings"
    tracing: "Tracing | None" = None

    def check(self, request: Request, model: str) -> None:
        """Raise NotPermitted where the request's key may not use this model, whether it exists or not."""
        key: Key | None = request.state.key
        if key is not None and not key.may_use(model):
            raise NotPermitted(f"The key {key.name!r} ({key.id}) may not use the model {model!r}", "model")

    async def enter(self, request: Request, model: str, prompt_tokens: int, most_tokens: int | None = None) -> "Visit":
        """Let a request in; whoever is given a visit ends it, as a context manager.

        ``most_tokens`` is what the request says of its answers' length. Raises RequestLimitReached, TokenLimitReached.
        """
        key: Key | None = request.state.key
        subjects = self._subjects(key, model)
        headers = await self.rates.enter(subjects, prompt_tokens) if subjects else {}
        return Visit(self, request, key, model, subjects, prompt_tokens, most_tokens, headers)

    def _subjects(self, key: Key | None, model: str) -> list[Subject]:
        """The key and the model, where they have limits."""
        settings = self.settings
        of_models = Limits(
            settings.variant_requests_per_minute, settings.variant_tokens_per_minute, settings.variant_concurrent
        )
        own = self.keys.variant_limits().get(model, Limits())
        subjects = [Subject(f"model {model}", f"The model {model!r}", own.over(of_models))]
        if key is not None:
            of_keys = Limits(settings.key_requests_per_minute, settings.key_tokens_per_minute, settings.key_concurrent)
            subjects.append(Subject(f"key {key.id}", f"The key {key.name!r} ({key.id})", key.limits.over(of_keys)))
        return [subject for subject in subjects if subject.limits != Limits()]


class Visit(AbstractContextManager["Visit"]):
    """One request that was let in. ``headers`` tell its client what is left.

    ``answer`` is set once there is one that is generated.
    """

    def __init__(
        self,
        visits: Visits,
        request: Request,
        key: Key | None,
        model: str,
        subjects: Sequence[Subject],
        prompt_tokens: int,
        most_tokens: int | None,
        headers: dict[str, str],
    ) -> None:
        self.request, self.key, self.model, self.headers = request, key, model, headers
        self.prompt_tokens, self.most_tokens = prompt_tokens, most_tokens
        self.answer: Answer | None = None
        self.arrived: float = request.state.arrived
        self.ended = 0.0
        self._visits, self._subjects = visits, subjects
        self.label = visits.metrics.labels.of(model)
        visits.metrics.in_flight.labels(self.label).inc()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The request is over; what it used is written down."""
        self.ended = perf_counter()
        visits, used = self._visits, self.used(error)
        visits.metrics.in_flight.labels(self.label).dec()
        if self._subjects:
            visits.rates.leave(self._subjects, used.completion_tokens)
        if used.requests:
            visits.ledger.add(self.key.id if self.key is not None else "", self.model, used)
        self._note(used)
        if self.answer is None:
            observe_whole(self, error, visits.metrics)
        elif not self.answer.refused:
            observe(self, self.answer, visits.metrics)
        if visits.tracing is not None:
            visits.tracing.record(self, error)

    @property
    def choices(self) -> Sequence[Choice]:
        return self.answer.choices if self.answer is not None else ()

    def used(self, error: BaseException | None) -> Used:
        """Nothing for a request that was refused before it began."""
        if self.answer is not None and self.answer.refused:
            return Used(0, 0, 0, 0, 0)
        if self.answer is None:
            fails = isinstance(error, GenerationFailed)
            return Used(int(error is None or fails), int(fails), self.prompt_tokens if error is None else 0, 0, 0)
        usage = self.answer.usage()
        failed = int(any(choice.outcome == "error" for choice in self.choices))
        cached = usage.prompt_tokens_details.cached_tokens
        return Used(1, failed, usage.prompt_tokens, cached, usage.completion_tokens)

    def _note(self, used: Used) -> None:
        """What the log's line for this request says beside the HTTP part."""
        self.request.state.noted = {
            "model": self.model,
            "prompt_tokens": used.prompt_tokens,
            "completion_tokens": used.completion_tokens,
            "finish_reasons": [choice.outcome for choice in self.choices],
        }


def observe(visit: Visit, answer: Answer, metrics: Metrics) -> None:
    """Count an answer that has ended."""
    label, choices = visit.label, answer.choices
    lengths = [choice.completion_tokens for choice in choices]
    metrics.request_prompt.labels(label).observe(visit.prompt_tokens)
    metrics.request_generation.labels(label).observe(sum(lengths))
    metrics.request_longest.labels(label).observe(max(lengths))
    metrics.params_n.labels(label).observe(len(choices))
    if visit.most_tokens is not None:
        metrics.params_max_tokens.labels(label).observe(visit.most_tokens)
    metrics.whole.labels(label).observe(visit.ended - visit.arrived)
    begun = [choice.times[0] for choice in choices if choice.times]
    if begun:
        metrics.first_token.labels(label).observe(min(begun) - visit.arrived)
    for choice in choices:
        metrics.ended.labels(label, choice.outcome).inc()
        _observe_choice(choice, label, metrics)


def observe_whole(visit: Visit, error: BaseException | None, metrics: Metrics) -> None:
    """Count a request without choices, to an encoder or given up before there were any, by how it ended.

    One that was refused is no request to the model.
    """
    if error is None:
        outcome = "stop"
    elif isinstance(error, GenerationFailed):
        outcome = "error"
    elif isinstance(error, CancelledError):
        outcome = "abort"
    else:
        return
    metrics.ended.labels(visit.label, outcome).inc()
    metrics.request_prompt.labels(visit.label).observe(visit.prompt_tokens)
    metrics.whole.labels(visit.label).observe(visit.ended - visit.arrived)


def _observe_choice(choice: Choice, label: str, metrics: Metrics) -> None:
    times = choice.times
    next_token, older = metrics.next_token.labels(label), metrics.next_token_older.labels(label)
    for before, after in pairwise(times):
        next_token.observe(after - before)
        older.observe(after - before)
    if len(times) > 1:
        metrics.mean_token.labels(label).observe((times[-1] - times[0]) / (len(times) - 1))
    finished = choice.finished
    if times and finished is not None and finished.queued_s is not None and finished.ran_s is not None:
        decoding_s = times[-1] - times[0]
        metrics.queue.labels(label).observe(finished.queued_s)
        metrics.inference.labels(label).observe(finished.ran_s)
        metrics.decode.labels(label).observe(decoding_s)
        metrics.prefill.labels(label).observe(max(finished.ran_s - decoding_s, 0.0))
