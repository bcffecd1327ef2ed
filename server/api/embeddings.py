"""``POST /v1/embeddings``: a vector for each text, pooled as the base's own files say."""

import base64
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel
from torch import Tensor

from deltaserve.delta_store.errors import RequestRefused
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.encoding import EncodingRequest, EncodingUsage, Ids, encode, usage
from deltaserve.server.api.fields import Between
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.served import Served

router = APIRouter(tags=["OpenAI"], route_class=BoundedRoute, responses=ERRORS)


class EmbeddingRequest(EncodingRequest):
    """The body of ``POST /v1/embeddings``."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Between(1, 2**31)] | None = None


class Embedding(BaseModel):
    """``embedding``: its numbers, or the base64 text of their float32 bytes, the lowest first."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EncodingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Embed one or several texts."""
    return await encode(request, body, _ask, _write)


async def _ask(body: EmbeddingRequest, engine: Any, ids: Ids, served: Served) -> list[Tensor]:
    if body.dimensions not in (None, engine.width):
        raise RequestRefused(
            f"'dimensions' must be {engine.width}, the model's own, or left out: its vectors are not made to be cut; "
            f"got {body.dimensions}",
            "dimensions",
        )
    vectors: list[Tensor] = await engine.embed(ids, served.version)
    return vectors


def _write(body: EmbeddingRequest, served: Served, ids: Ids, vectors: list[Tensor]) -> EmbeddingList:
    data = [
        Embedding(index=index, embedding=vector.tolist() if body.encoding_format == "float" else _packed(vector))
        for index, vector in enumerate(vectors)
    ]
    return EmbeddingList(data=data, model=served.name, usage=usage(ids))


def _packed(vector: Tensor) -> str:
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
