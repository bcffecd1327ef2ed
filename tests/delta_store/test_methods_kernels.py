"""What every method makes of a weight, the machine's fastest kernels compute as the reference does."""

import pytest
import torch
from tiny_deltas import encoded, tensor_delta

from deltaserve.delta_store.pruning.methods import METHODS
from deltaserve.kernels import dispatch, reference
from deltaserve.kernels.parts import Delta, Part
from deltaserve.kernels.segments import Segments


@pytest.mark.parametrize("name", [n for n, row in METHODS.items() if row.for_checkpoints and n != "lossless"])
def test_kernels_compute_what_a_method_keeps(name: str) -> None:
    """133 rows of 63: no block and no group of scales divides them."""
    parts = encoded(name, tensor_delta(133, 63))
    delta = Delta(parts[0][0].shape, tuple(part for _, part in parts if isinstance(part, Part)))
    x = torch.randn(5, 63, generator=torch.Generator().manual_seed(1))
    outputs = []
    for backend in (reference, dispatch.backend()):
        y = torch.zeros(5, 133)
        backend.delta_linear_(y, x, [backend.prepare(delta)], Segments.of([5], [0]))
        outputs.append(y)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0], x @ reference.unpack(delta).T, atol=1e-5, rtol=1e-5)
    assert outputs[0].abs().sum() > 0
