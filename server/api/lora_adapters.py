"""vLLM's routes to load and unload LoRA adapters by name, for tools that know only those. An adapter is a variant here.

They read folders of the server, so only those that the setting ``adapter_folders`` names.
"""

from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from deltaserve.delta_store.errors import MissingTensors, NotPermitted, RequestRefused, VariantNotFound
from deltaserve.server.api.bounded import BoundedRoute
from deltaserve.server.api.documented import TEXT
from deltaserve.server.api.fields import Body, Text, only
from deltaserve.server.api.responses import ERRORS
from deltaserve.server.api.variants import check_free, delete_variant, encode, register, sender
from deltaserve.server.files.contents import ADAPTER_FILES

router = APIRouter(tags=["variants"], route_class=BoundedRoute, responses=ERRORS)


class LoadAdapter(Body):
    """``lora_path`` is a folder of the server. ``load_inplace``: a variant of this name may be there already."""

    lora_name: Text
    lora_path: Annotated[Text, Field(min_length=1)]
    load_inplace: bool = False


class UnloadAdapter(Body):
    """``lora_int_id`` is vLLM's own number of an adapter."""

    lora_name: Text
    lora_int_id: Annotated[Any, only()] = None


@router.post("/v1/load_lora_adapter", response_class=Response, responses=TEXT)
async def load_lora_adapter(body: LoadAdapter, request: Request) -> Response:
    """Register the adapter in a folder of the server as a variant, as vLLM loads it under a name."""
    await to_thread.run_sync(_load, body, request, limiter=request.app.state.examinations)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=TEXT)
async def unload_lora_adapter(body: UnloadAdapter, request: Request) -> Response:
    """Remove a variant with all its versions, however it came; the same as ``DELETE /v1/variants/{name}``."""
    await run_in_threadpool(delete_variant, body.lora_name, request)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _load(body: LoadAdapter, request: Request) -> None:
    state, name = request.app.state, body.lora_name
    check_free(name, state)
    folder = allowed(body.lora_path, state.settings.adapter_folders)
    if not body.load_inplace and _is_there(name, state):
        raise RequestRefused(
            f"There is a variant {name!r} already; unload it, or set 'load_inplace' to true to replace it", "lora_name"
        )
    with state.blobs.workspace() as workspace:
        encode(folder, workspace / "artifact", state)
        register(name, workspace / "artifact", state, sender(request))


def allowed(path: str, folders: tuple[str, ...]) -> Path:
    """The adapter's folder: ``path`` as it is, or below one of ``folders``, and inside of them with links followed.

    Raises NotPermitted for any other, whether it exists or not; MissingTensors for a folder without an adapter.
    """
    if not folders:
        raise NotPermitted("No folder is open to this route; DELTASERVE_ADAPTER_FOLDERS names those that are")
    for root in (Path(folder).expanduser().resolve() for folder in folders):
        folder = _inside(root, path)
        if folder is None or not folder.is_dir():
            continue
        for name in ADAPTER_FILES:
            if _inside(root, str(folder / name)) is None:
                raise MissingTensors(f"The folder {path!r} has no {name}, which an adapter has")
        return folder
    raise NotPermitted(f"{path!r} is not a folder inside of those that DELTASERVE_ADAPTER_FOLDERS opens", "lora_path")


def _inside(root: Path, path: str) -> Path | None:
    """What is at ``path``, taken from ``root`` if it is relative; None if it is not there, or a link leads out."""
    try:
        resolved = (root / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # also too long, with a null byte, a link to itself
        return None
    return resolved if resolved.is_relative_to(root) else None


def _is_there(name: str, state: State) -> bool:
    try:
        state.registry.current(name)
    except VariantNotFound:
        return False
    return True
