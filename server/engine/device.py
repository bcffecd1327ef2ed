"""Where the base is kept, and the kernels that run there."""

import torch

from deltaserve.delta_store.errors import OptionError
from deltaserve.kernels import dispatch

DEVICES = ("auto", "cpu", "cuda")


def choose(device: str, backend: str, weights: str = "plain") -> tuple[torch.device, dispatch.Backend]:
    """``auto`` is the GPU where there is one, unless the backend is named and is no GPU's.

    Raises OptionError for a device or backend that is not there, and for settings that do not go together.
    """
    if device not in DEVICES:
        raise OptionError(f"Unknown device {device!r}; known are {', '.join(DEVICES)}")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        why = "torch sees no GPU" if torch.version.cuda or torch.version.hip else "this torch is built for CPUs only"
        raise OptionError(f"Device 'cuda' is not there: {why}; use device cpu or auto")
    wanted = "cuda" if device == "cuda" or (device == "auto" and there and backend in ("auto", "triton")) else "cpu"
    try:
        kernels = dispatch.backend(backend, wanted)
    except (ValueError, RuntimeError) as error:
        raise OptionError(str(error)) from error
    if kernels.device.type != wanted:
        raise OptionError(
            f"Backend {kernels.NAME!r} runs on {kernels.device.type}, and the base would be on {wanted}; "
            "leave backend at auto, or set the device that goes with it"
        )
    if wanted == "cuda" and weights == "packed":
        raise OptionError("Packed weights are a layout for CPUs; use weights plain or int8 on a GPU")
    return kernels.device, kernels
