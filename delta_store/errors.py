"""Everything that can go wrong for a reason the user can act on.

DeltaServeError
├── CheckpointError            a checkpoint or adapter folder cannot be used
│   ├── UnsafeCheckpoint       it needs a pickle that the safe loader refuses
│   ├── MissingTensors         tensors or shards that must be there are not
│   └── UnsupportedCheckpoint  it asks for something deltaserve does not do, named in the message
├── ArtifactError              an artifact cannot be used
│   ├── CorruptArtifact        damaged, cut short, or not an artifact
│   ├── UnsupportedArtifact    a format version, part or codec this version does not know
│   ├── BaseMismatch           made for another base
│   └── ProfileMissing         its activation profile is not in the store
├── OptionError                an option's value is unknown or out of range
├── ToleranceMissed            no artifact is within the tolerance
├── RegistryError
│   ├── VariantNotFound
│   ├── VersionNotFound        the variant never had these bytes
│   ├── InvalidName
│   └── RegistryUnavailable    the registry's server or file, or the object store, does not answer
├── UploadError
│   ├── UploadTooLarge
│   ├── UploadIncomplete
│   ├── UploadClosed           it was completed, cancelled or has expired
│   └── StorageFull            the disk has no room for it
├── FileError
│   ├── FileNotFound           no file has this id
│   └── UploadNotFound         no upload has this id
├── JobError
│   ├── JobNotFound            no job has this id
│   ├── JobFinished            too late to cancel it
│   └── JobFailed              its worker crashed, or needed more memory than it may have
├── AccessError                who asks may not, or not now (``headers`` go with the answer)
│   ├── KeyRefused             no API key, or one that is unknown or revoked
│   ├── KeyNotFound
│   ├── NotPermitted           the key's role or models do not allow it
│   ├── RequestLimitReached    too many requests in a minute, or at once
│   └── TokenLimitReached      too many tokens in a minute
└── EngineError
    ├── RequestRefused         this request can never run here (``param`` names the field)
    ├── ContextTooLong         prompt and answer exceed the context
    ├── QueueFull              try again later
    │   └── WaitedTooLong      its turn did not come in time
    ├── GenerationFailed       the request started and could not be finished
    └── EngineDown             the generation thread is not running
        └── ShuttingDown       what runs is finished, nothing new is taken

Messages say what was wrong, with the value and the limit, and what to do. ``server/api/errors.py`` maps each to HTTP.
"""


class DeltaServeError(Exception):
    """A failure with a message meant for the user."""


class CheckpointError(DeltaServeError):
    """A checkpoint or adapter folder cannot be used."""


class UnsafeCheckpoint(CheckpointError):
    """A pickle that the safe loader refuses."""


class MissingTensors(CheckpointError):
    """Tensors or shards that must be there are not."""


class UnsupportedCheckpoint(CheckpointError):
    """A checkpoint that asks for something deltaserve does not do."""


class ArtifactError(DeltaServeError):
    """An artifact cannot be used."""


class CorruptArtifact(ArtifactError):
    """Damaged, cut short, or not an artifact at all."""


class UnsupportedArtifact(ArtifactError):
    """A format version, part or codec that this version does not know."""


class BaseMismatch(ArtifactError):
    """The artifact was made for another base."""


class ProfileMissing(ArtifactError):
    """The activation profile that the artifact's masks were drawn from is not in the store."""

    def __init__(self, message: str, digest: str) -> None:
        super().__init__(message)
        self.digest = digest


class OptionError(DeltaServeError):
    """An option's value is unknown or out of range."""


class ToleranceMissed(DeltaServeError):
    """No artifact that was tried is within the tolerance; nothing was written."""


class RegistryError(DeltaServeError):
    """The registry refused or failed."""


class VariantNotFound(RegistryError):
    """No variant of this name."""


class VersionNotFound(RegistryError):
    """The variant has no version of this digest."""


class InvalidName(RegistryError):
    """A name that no variant can have."""


class RegistryUnavailable(RegistryError):
    """The registry's server or file does not answer."""


class UploadError(DeltaServeError):
    """An upload was refused; nothing of it is kept."""


class UploadTooLarge(UploadError):
    """More bytes than the limit allows."""


class UploadIncomplete(UploadError):
    """The body ended early, or did not match its announced length or checksum."""


class UploadClosed(UploadError):
    """It was completed, cancelled or has expired."""


class StorageFull(UploadError):
    """The disk has no room for it."""


class FileError(DeltaServeError):
    """A stored file or an upload cannot be used."""


class FileNotFound(FileError):
    """No file has this id."""


class UploadNotFound(FileError):
    """No upload has this id."""


class JobError(DeltaServeError):
    """A job cannot be shown, cancelled or finished."""


class JobNotFound(JobError):
    """No job has this id."""


class JobFinished(JobError):
    """Too late to cancel it."""


class JobFailed(JobError):
    """Its worker crashed, or needed more memory than it may have."""


class AccessError(DeltaServeError):
    """Who asks may not, or not now; ``headers`` of the answer say more."""

    def __init__(self, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.headers = headers or {}


class KeyRefused(AccessError):
    """No API key, or one that is unknown or revoked."""


class KeyNotFound(AccessError):
    """No key has this id."""


class NotPermitted(AccessError):
    """The key's role or models do not allow it."""


class RequestLimitReached(AccessError):
    """Too many requests in a minute, or at once."""


class TokenLimitReached(AccessError):
    """Too many tokens in a minute."""


class EngineError(DeltaServeError):
    """A request was not or will not be answered."""


class RequestRefused(EngineError):
    """A request that can never run here; ``param`` names the offending field."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextTooLong(RequestRefused):
    """Prompt and answer exceed the context."""


class QueueFull(EngineError):
    """As many requests wait as may; try again later."""


class WaitedTooLong(QueueFull):
    """Neither its variant nor the batch had a place for the request in time."""

    @classmethod
    def after(cls, seconds: float) -> "WaitedTooLong":
        """For a request that may have waited for so many seconds and no longer."""
        return cls(f"The request's turn did not come within {seconds:g} s, and none may wait longer; try later")


class GenerationFailed(EngineError):
    """The request started and could not be finished."""


class EngineDown(EngineError):
    """The generation thread is not running."""


class ShuttingDown(EngineDown):
    """The server finishes what runs and takes nothing new."""
