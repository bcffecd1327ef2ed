"""AdamR: an optimiser that keeps a fine-tune near its base, so that the delta can be pruned harder (DAREx).

Adam on the gradient of the loss; apart from it, each step pulls the weights back to the base's:

    s = sqrt(mean of v_hat over all parameters), or 1 where that is 0
    L2:  w <- w - lr * pull / s * (w - base)        L1:  w <- w - lr * pull / s * sign(w - base)
    w <- w - lr * m_hat / (sqrt(v_hat) + eps)

Dividing by s, the size of gradients, makes one ``pull`` fit different models and stages of training.
"""

import math
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from deltaserve.delta_store.errors import OptionError

NORMS = ("l2", "l1")


class AdamR(Optimizer):
    """Use like ``torch.optim.AdamW``, on a model that starts from the base's weights.

    ``pull`` is the strength lambda of the regularisation and ``norm`` its kind: ``l2`` is the partner of random drop
    (DAREx-L2), ``l1``, which wants a smaller ``pull``, of magnitude pruning. One copy of the weights as they are now is
    kept in the optimiser's state, so that a resumed training is pulled to the same base. A parameter group may bring
    them instead, uncopied: ``{"params": model.parameters(), "base": base_model.parameters()}``.

    Raises OptionError for settings out of range, and in ``step`` for sparse gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        pull: float = 0.1,
        norm: str = "l2",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "pull": pull, "norm": norm})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; here the weights become the base that they are pulled to, unless ``base`` gives it."""
        given = param_group.pop("base", None)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check(group)
        bases = [p.detach().clone() for p in group["params"]] if given is None else [b.detach() for b in given]
        _check_same_shapes(group["params"], bases)
        for parameter, base in zip(group["params"], bases, strict=True):
            self.state[parameter]["base"] = base

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for group, parameters in moving:
            self._update_moments(group, parameters)
        size = self._gradient_size()
        for group, parameters in moving:
            if parameters:
                self._pull(group, parameters, size)
                self._descend(group, parameters)
        return loss

    def _update_moments(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(gradient.is_sparse for gradient in gradients):
            raise OptionError("AdamR takes no sparse gradients; make the embedding with sparse=False")
        for parameter in parameters:
            state = self.state[parameter]
            if "step" not in state:
                state |= {"step": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
            state["step"] += 1
        if parameters:
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(self._states(parameters, "m"), gradients, 1 - beta1)
            torch._foreach_mul_(self._states(parameters, "v"), beta2)
            torch._foreach_addcmul_(self._states(parameters, "v"), gradients, gradients, 1 - beta2)

    def _gradient_size(self) -> float:
        """s: the root of v_hat's mean over all parameters that ever had a gradient."""
        sums: list[Tensor] = []
        count = 0
        for group in self.param_groups:
            known = [p for p in group["params"] if "v" in self.state[p]]
            if known:
                totals = torch._foreach_norm(self._states(known, "v"), 1, dtype=torch.float32)  # v is never negative
                sums += torch._foreach_div(totals, self._corrections(known, group["betas"][1]))
                count += sum(p.numel() for p in known)
        return (math.sqrt(torch.stack(sums).sum().item() / count) if sums else 0.0) or 1.0

    def _pull(self, group: dict[str, Any], parameters: list[Tensor], size: float) -> None:
        step, bases = group["lr"] * group["pull"] / size, self._states(parameters, "base")
        if group["norm"] == "l2":
            torch._foreach_lerp_(parameters, bases, step)
            return
        signs = torch._foreach_sub(parameters, bases)
        torch._foreach_sign_(signs)
        torch._foreach_add_(parameters, signs, alpha=-step)

    def _descend(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        sizes = torch._foreach_div(self._states(parameters, "v"), self._corrections(parameters, beta2))
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, group["eps"])
        steps = [-group["lr"] / correction for correction in self._corrections(parameters, beta1)]
        torch._foreach_addcdiv_(parameters, self._states(parameters, "m"), sizes, steps)

    def _states(self, parameters: list[Tensor], key: str) -> list[Tensor]:
        return [self.state[p][key] for p in parameters]

    def _corrections(self, parameters: list[Tensor], beta: float) -> list[float]:
        """What a moment is divided by, because it began at zero."""
        return [1 - beta ** self.state[p]["step"] for p in parameters]


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "pull"):
        if not 0 <= group[name] < math.inf:
            raise OptionError(f"{name} is {group[name]}; it is a number of 0 or more")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise OptionError(f"betas are {group['betas']}; both lie from 0 to below 1")
    if group["norm"] not in NORMS:
        raise OptionError(f"norm is {group['norm']!r}; it can be {', '.join(NORMS)}")


def _check_same_shapes(parameters: list[Tensor], bases: list[Tensor]) -> None:
    ours, theirs = [tuple(p.shape) for p in parameters], [tuple(b.shape) for b in bases]
    if ours != theirs:
        raise OptionError(f"The base's {len(theirs)} tensors do not fit the group's {len(ours)}; give one for each")
