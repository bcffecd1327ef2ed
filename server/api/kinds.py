"""Which routes fit the kind of base that is served: one that generates, or an encoder."""

from typing import Any

from starlette.datastructures import State

from deltaserve.delta_store.errors import RequestRefused


def is_encoder(engine: Any) -> bool:
    """Whether the engine gives vectors and class scores instead of tokens."""
    return hasattr(engine, "embed")


def check_generates(state: State) -> None:
    """Raise RequestRefused where the base is an encoder."""
    if is_encoder(state.engine):
        raise RequestRefused(
            f"The base {state.settings.base_name!r} is an encoder, which generates no text; use /v1/embeddings, or "
            "/v1/classify with a variant that classifies",
            "model",
        )


def check_encodes(state: State) -> None:
    """Raise RequestRefused where the base is none."""
    if not is_encoder(state.engine):
        raise RequestRefused(
            f"The base {state.settings.base_name!r} generates text and gives no embeddings and classes; use "
            "/v1/chat/completions or /v1/completions, or serve an encoder",
            "model",
        )
