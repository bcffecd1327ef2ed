"""``POST /v1/classify``: for each text the scores of all classes, in the shape of vLLM's route."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel
from torch import Tensor

from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.encoding import EncodingRequest, EncodingUsage, Ids, encode, usage
from deltaserve.server.api.responses import ERRORS, head
from deltaserve.server.api.served import Served

router = APIRouter(tags=["classification"], route_class=BoundedRoute, responses=ERRORS)


class ClassificationRequest(EncodingRequest):
    """The body of ``POST /v1/classify``."""


class Classification(BaseModel):
    """``label`` is that of the largest of ``probs``."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassificationUsage(EncodingUsage):
    completion_tokens: Literal[0] = 0
    prompt_tokens_details: None = None


class ClassificationList(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: ClassificationUsage


Outcome = tuple[tuple[str, ...], list[Tensor]]


@router.post("/v1/classify", response_model=ClassificationList)
@router.post("/classify", response_model=ClassificationList, include_in_schema=False)
async def create_classification(body: ClassificationRequest, request: Request) -> Response:
    """Classify one or several texts; the same at ``/classify``, where vLLM has it."""
    return await encode(request, body, _ask, _write)


async def _ask(body: ClassificationRequest, engine: Any, ids: Ids, served: Served) -> Outcome:
    found, scores = await engine.classify(ids, served.version)
    return found.labels, scores


def _write(body: ClassificationRequest, served: Served, ids: Ids, outcome: Outcome) -> ClassificationList:
    labels, scores = outcome
    data = [
        Classification(index=index, label=labels[int(probs.argmax())], probs=probs.tolist(), num_classes=len(labels))
        for index, probs in enumerate(scores)
    ]
    first = head("list", "classify", served.name, served.digest)
    first.pop("system_fingerprint")
    return ClassificationList(**first, data=data, usage=ClassificationUsage(**usage(ids).model_dump()))
