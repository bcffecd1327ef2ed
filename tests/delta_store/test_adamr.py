"""AdamR against a line-by-line transcription of its algorithm, and in transformers' Trainer."""

import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.pruning.adamr import AdamR

SHAPES = [(7, 5), (11,), (3, 4)]


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


class Transcription:
    """The algorithm of the module's docstring, number by number, in Python floats."""

    def __init__(self, start: list[Tensor], lr: float, pull: float, norm: str) -> None:
        self.base = [tensor.flatten().tolist() for tensor in start]
        self.weights = [list(values) for values in self.base]
        self.m = [[0.0] * len(values) for values in self.base]
        self.v = [[0.0] * len(values) for values in self.base]
        self.lr, self.pull, self.norm, self.t = lr, pull, norm, 0

    def step(self, gradients: list[Tensor]) -> None:
        self.t += 1
        b1, b2, eps = 0.9, 0.999, 1e-8
        squares = []
        for i, gradient in enumerate(gradients):
            for j, g in enumerate(gradient.flatten().tolist()):
                self.m[i][j] = b1 * self.m[i][j] + (1 - b1) * g
                self.v[i][j] = b2 * self.v[i][j] + (1 - b2) * g * g
                squares.append(self.v[i][j] / (1 - b2**self.t))
        s = math.sqrt(sum(squares) / len(squares)) or 1.0
        for i, weights in enumerate(self.weights):
            for j, w in enumerate(weights):
                away = w - self.base[i][j]
                if self.norm == "l1":
                    away = 0.0 if away == 0 else math.copysign(1.0, away)
                w -= self.lr * self.pull / s * away
                m_hat, v_hat = self.m[i][j] / (1 - b1**self.t), self.v[i][j] / (1 - b2**self.t)
                weights[j] = w - self.lr * m_hat / (math.sqrt(v_hat) + eps)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_it_is_its_algorithm(norm: str) -> None:
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in tensors(0)]
    wanted = Transcription(tensors(0), 0.01, 3.0, norm)
    optimiser = AdamR(parameters, lr=0.01, pull=3.0, norm=norm)
    for step in range(12):
        gradients = tensors(step + 1, 0.3)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        wanted.step(gradients)
    for parameter, weights in zip(parameters, wanted.weights, strict=True):
        torch.testing.assert_close(parameter.detach().flatten(), torch.tensor(weights), atol=2e-6, rtol=0)


def test_without_pull_it_is_adam() -> None:
    """Also where a parameter gets its first gradient later than the others."""
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in tensors(0)] for _ in range(2))
    pair = (AdamR(ours, lr=0.01, pull=0.0), torch.optim.Adam(theirs, lr=0.01))
    for step in range(5):
        for parameters, optimiser in zip((ours, theirs), pair, strict=True):
            for i, (parameter, gradient) in enumerate(zip(parameters, tensors(step + 1), strict=True)):
                parameter.grad = None if i == 1 and step < 2 else gradient.clone()
            optimiser.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_without_gradients_to_follow_it_returns_to_the_base(norm: str) -> None:
    base = tensors(0)
    parameters = [torch.nn.Parameter(tensor + 0.1) for tensor in base]
    optimiser = AdamR([{"params": parameters, "base": base}], lr=0.01, pull=1.0, norm=norm)
    for _ in range(600):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    for parameter, tensor in zip(parameters, base, strict=True):
        assert (parameter - tensor).abs().max() < 0.02


def test_given_base_tensors_are_read_and_not_copied() -> None:
    base = tensors(0)
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in base]
    optimiser = AdamR([{"params": parameters, "base": base}])
    for parameter, tensor in zip(parameters, base, strict=True):
        assert optimiser.state[parameter]["base"].data_ptr() == tensor.data_ptr()
    assert "base" not in optimiser.param_groups[0]


def test_no_step_copies_the_base() -> None:
    """All that a step allocates is one list of tensors for the denominators."""
    parameter = torch.nn.Parameter(torch.zeros(1000))
    optimiser = AdamR([parameter])
    parameter.grad = torch.ones(1000)
    optimiser.step()
    with Allocations() as watched:
        optimiser.step()
    assert [n for n in watched.numbers if n >= 1000] == [1000]


class Allocations(TorchDispatchMode):
    """How many numbers each tensor has that an operation returns, in-place operations left out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        returned = result if isinstance(result, list | tuple) else [result]
        if not function._schema.is_mutable:
            self.numbers += [tensor.numel() for tensor in returned if isinstance(tensor, Tensor)]
        return result


def test_a_resumed_training_is_pulled_to_the_same_base() -> None:
    def trained(steps: range, parameters: list[Any], optimiser: AdamR) -> None:
        for step in steps:
            for parameter, gradient in zip(parameters, tensors(step + 1), strict=True):
                parameter.grad = gradient
            optimiser.step()

    straight = [torch.nn.Parameter(tensor) for tensor in tensors(0)]
    optimiser = AdamR(straight, lr=0.01, pull=2.0)
    trained(range(4), straight, optimiser)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    other = AdamR(resumed, lr=0.01, pull=2.0)
    other.load_state_dict(deepcopy(optimiser.state_dict()))
    trained(range(4, 8), straight, optimiser)
    trained(range(4, 8), resumed, other)
    for one, two in zip(straight, resumed, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"pull": float("nan")}, "pull is nan"),
        ({"betas": (0.9, 1.0)}, "from 0 to below 1"),
        ({"norm": "l3"}, "norm is 'l3'; it can be l2, l1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        AdamR([torch.nn.Parameter(torch.zeros(2))], **settings)


def test_what_it_cannot_do_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(OptionError, match="1 tensors do not fit the group's 1"):
        AdamR([{"params": [parameter], "base": [torch.zeros(2)]}])
    parameter.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(OptionError, match="sparse"):
        AdamR([parameter]).step()


IDS = [1, *range(5, 20)]


def train(folder: Path, optimiser: AdamR, model: LlamaForCausalLM) -> tuple[float, float]:
    """A few steps of Trainer: the loss then, and the RMS of the delta."""
    arguments = TrainingArguments(
        str(folder), max_steps=10, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": IDS, "labels": IDS}] * 8
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimiser, None)).train()  # type: ignore[arg-type]
    base = tiny_llama().state_dict()
    deltas = [(tensor - base[name]).flatten() for name, tensor in model.state_dict().items()]
    return loss_of(model), torch.cat(deltas).square().mean().sqrt().item()


def loss_of(model: LlamaForCausalLM) -> float:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.item()


@pytest.mark.parametrize(("norm", "pull"), [("l2", 1.0), ("l1", 0.003)])
def test_in_trainer_it_learns_and_stays_nearer(norm: str, pull: float, tmp_path: Path) -> None:
    free, pulled = tiny_llama(), tiny_llama()
    before = loss_of(free)
    free_loss, free_distance = train(tmp_path, AdamR(free.parameters(), lr=5e-3, pull=0.0), free)
    loss, distance = train(tmp_path, AdamR(pulled.parameters(), lr=5e-3, pull=pull, norm=norm), pulled)
    assert free_loss < loss < 0.8 * before
    assert 0 < distance < 0.9 * free_distance


def test_the_guide_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it trains is then compressed as it says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    guide = (Path(__file__).parents[2] / "docs" / "train_for_pruning.md").read_text()
    code = guide.split("```python\n")[1].split("```")[0]
    base, out = save(tiny_llama(), tmp_path / "base"), tmp_path / "out"
    exec(code, {"BASE": str(base), "OUT": str(out), "dataset": [{"input_ids": IDS, "labels": IDS}] * 8})
    receipt = compress(base, out, tmp_path / "artifact", method="darex", options={"drop": 0.5})
    assert receipt.tensors_changed == 20
