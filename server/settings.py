"""Every setting of a server: one frozen class, read from ``DELTASERVE_*`` variables and flags (docs/settings.md)."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from deltaserve.delta_store.errors import OptionError

PREFIX = "DELTASERVE_"


class Settings(BaseSettings):
    """What a server is started with. Build it with ``load``, which names what is wrong in one line."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    base: str = Field(min_length=1, description="Base model: a folder, a GGUF file, or org/name with a hub in reach")
    store: Path = Field(Path("~/.local/share/deltaserve"), description="Folder of registry, artifacts and profiles")
    registry: str = Field(
        "sqlite",
        description="Where variants are registered: sqlite, in the store; or redis://HOST:PORT/DB, for replicas",
    )
    registry_prefix: str = Field("deltaserve", min_length=1, description="Beginning of all keys in Redis")
    blobs: str | None = Field(
        None,
        description="Object store of artifacts and profiles, as s3://BUCKET/PREFIX; only in the store if not given",
    )
    host: str = Field("127.0.0.1", description="Address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    served_name: str | None = Field(None, description="Model id of the base; the last part of its path if not given")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the base and its variants are: cpu, cuda, or the GPU where there is one (auto)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Number format of the loaded base")
    weights: Literal["plain", "int8", "packed"] = Field(
        "plain",
        description="Weights of the base's linear layers: plain, in dtype; int8 with a scale a row; or packed, kept "
        "twice where that is faster",
    )
    policy: Literal["auto", "mixed", "swap"] = Field(
        "auto", description="Deltas apply beside the base (mixed), inside its weights (swap), or as measured (auto)"
    )
    backend: str = Field("auto", description="Kernel backend; auto takes the fastest one for the device")
    max_upload_bytes: PositiveInt = Field(4 * 2**30, description="Largest body of an upload, in bytes")
    max_upload_parts: PositiveInt = Field(32, description="Most parts of a multipart upload")
    upload_idle_seconds: PositiveFloat = Field(30.0, description="Longest pause of an upload before it is refused")
    max_file_bytes: PositiveInt = Field(64 * 2**30, description="Largest file that is sent in parts, in bytes")
    upload_seconds: PositiveFloat = Field(86400.0, description="Longest time from the first to the last of such parts")
    max_jobs: PositiveInt = Field(1, description="Most compression jobs that run at once; the others wait")
    job_memory_bytes: PositiveInt = Field(
        16 * 2**30, description="Memory that a job may use before it is ended, in bytes"
    )
    job_threads: PositiveInt = Field(1, description="Threads of a job")
    job_nice: int = Field(10, ge=0, le=19, description="How far a job gives way to serving, as nice has it; 19 is most")
    adapter_folders: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Folders from which /v1/load_lora_adapter may load, as FOLDER,FOLDER; none if not given"
    )
    bank_bytes: PositiveInt = Field(2**30, description="Memory for the decoded deltas of loaded variants, in bytes")
    bank_slots: PositiveInt = Field(64, description="Most variants in memory at once")
    host_bytes: PositiveInt = Field(2**32, description="Artifacts that stay open on the host, in bytes of their files")
    pin: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Variants to load before the server is ready and to keep in memory, as NAME,NAME"
    )
    cache_tokens: PositiveInt = Field(16384, description="Tokens that the key-value cache holds, all requests together")
    context: PositiveInt | None = Field(
        None, description="Longest prompt and answer, in tokens; the model's if not given"
    )
    default_max_tokens: PositiveInt | None = Field(
        None, description="Longest chat answer to a request without max_tokens; what the context leaves if not given"
    )
    max_running: PositiveInt = Field(32, description="Most requests in one batch")
    max_waiting: PositiveInt = Field(256, description="Most requests that wait; more are told to try again later")
    max_wait_seconds: PositiveFloat | None = Field(
        None,
        description="Longest time that a request waits for its turn before it is told to try again later; as long as "
        "it takes if not given",
    )
    batch_tokens: PositiveInt = Field(512, description="Most tokens in one step; longer prompts are read in pieces")
    threads: PositiveInt | None = Field(
        None, description="Threads of the numeric libraries; theirs to choose if not given"
    )
    tensor_parallel: PositiveInt = Field(
        1,
        description="Processes that share the layers of one base between them; each has threads, bank_bytes and "
        "host_bytes of its own",
    )
    keys: Literal["auto", "required", "off"] = Field(
        "auto",
        description="API keys: required, off, or asked for once there are any (auto), which also refuses an address "
        "that others reach as long as there are none",
    )
    key_requests_per_minute: PositiveInt | None = Field(
        None, description="Most requests a minute of a key without a limit of its own"
    )
    key_tokens_per_minute: PositiveInt | None = Field(
        None, description="Most tokens a minute, of prompts and answers, of such a key"
    )
    key_concurrent: PositiveInt | None = Field(None, description="Most requests at once of such a key")
    variant_requests_per_minute: PositiveInt | None = Field(
        None, description="Most requests a minute for a variant, or the base, without a limit of its own"
    )
    variant_tokens_per_minute: PositiveInt | None = Field(None, description="Most tokens a minute for such a variant")
    variant_concurrent: PositiveInt | None = Field(None, description="Most requests at once for such a variant")
    limits_storage: str = Field(
        "memory://", description="Where the minute's counts are kept; redis://HOST:PORT/DB shares them among servers"
    )
    metrics_public: bool = Field(False, description="Whether /metrics is open where the rest needs a key")
    metrics_variants: PositiveInt = Field(
        100, description="Most variants that have metrics of their own; the others are counted together as other"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector (OTLP over HTTP) that gets traces, as http://HOST:4318; none if not given",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "info", description="Lowest level logged"
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text, or as JSON objects")
    shutdown_seconds: PositiveFloat = Field(
        30.0, description="Longest time that running requests may take to finish once the server is told to stop"
    )

    @field_validator("pin", "adapter_folders", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @property
    def base_name(self) -> str:
        """The model id under which the base is served."""
        return self.served_name or Path(self.base).name

    @property
    def folder(self) -> Path:
        """``store`` with ``~`` filled in."""
        return self.store.expanduser()


def load(flags: dict[str, Any] | None = None) -> Settings:
    """Settings from the environment, overridden by those ``flags`` that are not None.

    Raises OptionError that names an unknown ``DELTASERVE_`` variable, or the malformed or missing setting.
    """
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in (*known, PREFIX + "API_KEY"):  # the clients' own
            raise OptionError(f"Unknown setting {name} in the environment; known are {', '.join(known)}")
    try:
        return Settings(**{name: value for name, value in (flags or {}).items() if value is not None})
    except ValidationError as error:
        raise OptionError("; ".join(_complaint(detail) for detail in error.errors())) from error


def _complaint(detail: Any) -> str:
    name = str(detail["loc"][0])
    given = "" if detail["type"] == "missing" else f" = {detail['input']!r}"
    flag = "argument BASE" if name == "base" else f"flag --{name.replace('_', '-')}"
    return f"Setting {PREFIX}{name.upper()}{given} ({flag}): {detail['msg']}"
