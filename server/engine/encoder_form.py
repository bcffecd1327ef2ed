"""How a family's body takes a batch of texts: flat or padded. Found by trying, with each text alone as the judge."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltaserve.delta_store.errors import UnsupportedCheckpoint
from deltaserve.server.engine import attention, encoder_attention
from deltaserve.server.engine.encoder_attention import Texts

LENGTHS = (5, 3, 9)
"""Of the texts that are tried: all different, and different from their number."""


@dataclass(frozen=True, slots=True)
class Form:
    """``first`` is the position of a text's first token, None where the body must number them itself.

    A flat batch is ``[1, rows]``, a padded one ``[texts, longest]``. In a flat one the body's pooler, which looks at
    the beginning of a text, is left out and called for the texts afterwards.
    """

    flat: bool
    first: int | None

    def inputs(self, texts: Sequence[Sequence[int]], padding: int) -> dict[str, Any]:
        """The arguments of the body."""
        lengths = [len(text) for text in texts]
        if self.flat:
            ids = torch.tensor([token for text in texts for token in text])[None]
            positions = torch.cat([torch.arange(length) for length in lengths])[None] + (self.first or 0)
            return {"input_ids": ids, "position_ids": positions, "texts": Texts.of(lengths)}
        longest = max(lengths)
        ids = torch.tensor([[*text, *[padding] * (longest - len(text))] for text in texts])
        mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if self.first is not None:
            inputs["position_ids"] = torch.arange(longest).repeat(len(texts), 1) + self.first
        return inputs

    def kind_of(self, x: Tensor, lengths: Sequence[int], inside: bool) -> str:
        """What a layer's input ``x`` has a row for: each token, each text, or something else; ``inside`` the body."""
        shape = (1, sum(lengths)) if self.flat else (len(lengths), max(lengths))
        if not x.is_floating_point():
            return "tokens" if tuple(x.shape) == shape else "others"
        if tuple(x.shape[:2]) == shape or (x.ndim == 2 and len(x) == shape[0] * shape[1]):
            return "tokens"
        is_of_texts = len(x) == len(lengths) and x.shape[1:-1].numel() == 1
        return "texts" if is_of_texts and not (self.flat and inside) else "others"


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """A form that works. ``kinds`` says of each module that was called what it has a row for, always the same."""

    form: Form
    kinds: dict[nn.Module, str]


@torch.inference_mode()
def tried(body: Any, pooler: nn.Module | None, padding: int, vocabulary: int) -> Trial:
    """The first form in which a batch gives what each text gives alone. ``pooler`` is the body's, if it has one.

    Raises UnsupportedCheckpoint where none does.
    """
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary // 2, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    alone = [body(input_ids=torch.tensor([text])) for text in texts]
    hidden = torch.cat([outputs[0][0] for outputs in alone])
    pooled = None if pooler is None else torch.cat([outputs.pooler_output for outputs in alone])
    for form in _forms(body, padding):
        kinds: dict[nn.Module, set[str]] = {}
        try:
            with _watched(body, form, kinds):
                found = run(body, pooler, form, texts, padding)
        except (TypeError, ValueError, RuntimeError, IndexError):  # a form that this family does not take
            continue
        if _alike(found[0], hidden) and (pooled is None or (found[1] is not None and _alike(found[1], pooled))):
            certain = {module: seen.pop() if len(seen) == 1 else "others" for module, seen in kinds.items()}
            return Trial(form, certain)
    raise UnsupportedCheckpoint(f"What a {type(body).__name__} says of a text depends on the texts beside it")


def run(
    body: Any, pooler: nn.Module | None, form: Form, texts: Sequence[Sequence[int]], padding: int
) -> tuple[Tensor, Tensor | None]:
    """The last hidden states ``[rows, width]`` of all tokens, text after text, and what the pooler gives for each."""
    inputs = form.inputs(texts, padding)
    if not form.flat:
        outputs = body(**inputs)
        return outputs[0][inputs["attention_mask"].bool()], getattr(outputs, "pooler_output", None)
    with without_pooler(body, pooler):
        hidden: Tensor = body(**inputs)[0][0]
    if pooler is None:
        return hidden, None
    lengths = torch.tensor([len(text) for text in texts])
    return hidden, pooler(hidden[lengths.cumsum(0) - lengths][:, None])


@contextmanager
def without_pooler(body: Any, pooler: nn.Module | None) -> Iterator[None]:
    """The body, with nothing done by its pooler."""
    if pooler is None:
        yield
        return
    body.pooler = nn.Identity()
    try:
        yield
    finally:
        body.pooler = pooler


def _forms(body: Any, padding: int) -> Iterator[Form]:
    """Those to try, the best first. RoBERTa's positions begin after the padding token's number."""
    firsts = (0, padding + 1)
    if body._can_set_attn_implementation():  # else it has an attention of its own
        body.set_attn_implementation(encoder_attention.NAME)
        if attention.unsupported(body.config) is None:
            yield from (Form(True, first) for first in firsts)
    yield from (Form(False, first) for first in (*firsts, None))


@contextmanager
def _watched(body: Any, form: Form, kinds: dict[nn.Module, set[str]]) -> Iterator[None]:
    running = [False]

    def mark(value: bool) -> Callable[..., None]:
        return lambda *_: running.__setitem__(0, value)

    def look(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = next((value for value in (*arguments, *named.values()) if isinstance(value, Tensor)), None)
        kind = "others" if x is None else form.kind_of(x, LENGTHS, running[0])
        kinds.setdefault(module, set()).add(kind)

    handles = [body.register_forward_pre_hook(mark(True)), body.register_forward_hook(mark(False))]
    handles += [m.register_forward_pre_hook(look, with_kwargs=True) for m in body.modules() if not list(m.children())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Up to the rounding of the dtype."""
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    return found.shape == expected.shape and bool(
        (found.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max()
    )
