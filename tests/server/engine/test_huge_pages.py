"""A base's weights in huge pages: the same tensors in another place."""

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaserve.server.engine import huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_tensors_stay_what_they_are() -> None:
    turned = torch.randn(70, 30).T
    tensors = [torch.randn(3), turned, torch.randn(5, 7).bfloat16(), torch.tensor(2.0), torch.randint(9, (4, 4)).char()]
    copies = [tensor.clone() for tensor in tensors]
    strides, places = [tensor.stride() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    huge_pages.move(tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert [tensor.stride() for tensor in tensors] == strides
    assert not {tensor.data_ptr() for tensor in tensors} & set(places)
    assert all(tensor.data_ptr() % huge_pages.ALIGNMENT == 0 for tensor in tensors)


def test_weights_that_are_one_stay_one() -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight.data = embedding.weight.data
    apart = nn.Linear(8, 50, bias=False)
    huge_pages.move([embedding.weight, head.weight, apart.weight])
    assert head.weight.data_ptr() == embedding.weight.data_ptr() != apart.weight.data_ptr()
    with torch.no_grad():
        head.weight[3] = 7
    assert (embedding(torch.tensor(3)) == 7).all()


def test_what_is_no_run_of_memory_stays_where_it_is() -> None:
    part, empty = torch.randn(9, 9)[:, :4], torch.empty(0)
    place = part.data_ptr()
    huge_pages.move([part, empty])
    assert part.data_ptr() == place
    assert empty.numel() == 0


def test_a_system_without_huge_pages_has_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # which no system knows: EINVAL
    tensor = torch.randn(4, 4)
    copy = tensor.clone()
    huge_pages.move([tensor])
    assert torch.equal(tensor, copy)


@pytest.mark.skipif(
    not THP.exists() or "[never]" in THP.read_text(), reason="this system gives no transparent huge pages"
)
def test_pages_are_huge() -> None:
    weights = [torch.ones(1 << 20) for _ in range(8)]  # 4 MB each
    old = [weight.detach() for weight in weights]  # which may lie in huge pages, too, and stay where they are
    before = huge_bytes()
    huge_pages.move(weights)
    assert all(there.data_ptr() != weight.data_ptr() for there, weight in zip(old, weights, strict=True))
    assert huge_bytes() - before >= 16 << 20, "half of them: the system may be short of the others"


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
