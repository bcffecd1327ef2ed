"""API keys over HTTP, for admins: make, list, revoke; and the limits of single variants."""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.access.keys import Key, Limits
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.fields import Body
from deltaserve.server.api.responses import ERRORS

router = APIRouter(tags=["keys"], route_class=BoundedRoute, responses=ERRORS)

Most = Annotated[int | None, Field(ge=1, le=10**12)]
ModelPattern = Annotated[str, Field(min_length=1, max_length=128)]


class LimitsBody(Body):
    """The most requests and tokens a minute, and requests at once; what is absent has the server's default."""

    requests_per_minute: Most = None
    tokens_per_minute: Most = None
    concurrent: Most = None

    @property
    def limits(self) -> Limits:
        return Limits(self.requests_per_minute, self.tokens_per_minute, self.concurrent)


class KeyBody(LimitsBody):
    """A key to be made. ``models`` are names or patterns such as ``team/*``; absent, the key may use all."""

    name: Annotated[str, Field(min_length=1, max_length=128)]
    role: Literal["infer", "admin"] = "infer"
    models: Annotated[list[ModelPattern], Field(max_length=1000)] | None = None


@dataclass(frozen=True, slots=True)
class LimitsAnswer:
    """Limits as they are set; null where the server's default counts."""

    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent: int | None


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    """A key without its text. ``models`` null are all models; times in Unix seconds, ``revoked`` null if it works."""

    id: str
    object: Literal["key"]
    name: str
    role: Literal["infer", "admin"]
    models: list[str] | None
    limits: LimitsAnswer
    created: int
    revoked: int | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; ``key`` is its text, which is shown this once."""

    key: str
    details: KeyAnswer


@dataclass(frozen=True, slots=True)
class KeyList:
    """All keys, oldest first, revoked ones too."""

    object: Literal["list"]
    data: list[KeyAnswer]


@dataclass(frozen=True, slots=True)
class VariantLimits:
    """The limits of one model, all its users together."""

    model: str
    limits: LimitsAnswer


@dataclass(frozen=True, slots=True)
class VariantLimitsList:
    """The models that have limits of their own."""

    object: Literal["list"]
    data: list[VariantLimits]


@router.post("/v1/keys", status_code=201)
def create_key(body: KeyBody, request: Request) -> NewKey:
    """Make a key."""
    key, text = request.app.state.keys.create(body.name, body.role, body.models, body.limits)
    return NewKey(text, answered(key))


@router.get("/v1/keys")
def list_keys(request: Request) -> KeyList:
    """All keys, without their texts."""
    return KeyList("list", [answered(key) for key in request.app.state.keys.listed()])


@router.delete("/v1/keys/{key_id}")
def revoke_key(key_id: str, request: Request) -> KeyAnswer:
    """Let a key open nothing any more; its usage stays."""
    return answered(request.app.state.keys.revoke(key_id))


@router.get("/v1/limits")
def list_limits(request: Request) -> VariantLimitsList:
    """The models that have limits of their own."""
    limits = request.app.state.keys.variant_limits()
    return VariantLimitsList("list", [_of_variant(model, limits[model]) for model in sorted(limits)])


@router.put("/v1/limits/{model:path}")
def limit_model(model: str, body: LimitsBody, request: Request) -> VariantLimits:
    """Give a variant, or the base, limits of its own, whoever asks it; an empty object takes them away."""
    if not 0 < len(model) <= 128:
        raise RequestRefused(f"'model' must have 1 to 128 characters; got {len(model)}", "model")
    request.app.state.keys.limit_variant(model, body.limits)
    return _of_variant(model, body.limits)


def answered(key: Key) -> KeyAnswer:
    """What is told about a key."""
    return KeyAnswer(
        key.id,
        "key",
        key.name,
        key.role,
        None if key.models is None else list(key.models),
        _limits(key.limits),
        int(key.created),
        None if key.revoked is None else int(key.revoked),
    )


def _limits(limits: Limits) -> LimitsAnswer:
    values = asdict(limits)
    return LimitsAnswer(values["requests"], values["tokens"], values["concurrent"])


def _of_variant(model: str, limits: Limits) -> VariantLimits:
    return VariantLimits(model, _limits(limits))
