"""The table of methods: what each keeps of a delta. Adding one is adding a function and a row of ``METHODS``."""

from collections.abc import Mapping
from dataclasses import dataclass

from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.pruning.darex import search
from deltaserve.delta_store.pruning.dense import dense
from deltaserve.delta_store.pruning.exact import lora, lossless
from deltaserve.delta_store.pruning.factors import lora_darex
from deltaserve.delta_store.pruning.importance import magnitude, wanda
from deltaserve.delta_store.pruning.low_rank import low_rank
from deltaserve.delta_store.pruning.options import Options, Value
from deltaserve.delta_store.pruning.output_scale import unbiased_outputs
from deltaserve.delta_store.pruning.random_drop import dare, darex, weighted
from deltaserve.delta_store.pruning.residual import dense_residual, low_rank_residual
from deltaserve.delta_store.pruning.structural import structural
from deltaserve.delta_store.pruning.tuning import Tune
from deltaserve.delta_store.pruning.weights import Function, of_linears


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table. ``defaults`` are the options that the method takes; ``source`` is where it is from.

    ``branch`` is its kind, in the words of the paper's flowchart. ``needs_profile``: it looks at the
    base's activation profile. ``tune`` finds, once all is pruned and with the whole model on text, what survivors are
    divided by.
    """

    name: str
    function: Function
    defaults: Mapping[str, Value]
    source: str
    branch: str
    needs_profile: bool = False
    tune: Tune | None = None
    for_adapters: bool = True
    for_checkpoints: bool = True

    def options(self, given: Mapping[str, Value]) -> Options:
        """The defaults with what was given in their place. Raises OptionError for what the method does not take."""
        if unknown := sorted(given.keys() - self.defaults.keys()):
            takes = ", ".join(self.defaults) or "no options"
            raise OptionError(f"The method {self.name} has no option {unknown[0]}; it takes: {takes}")
        return Options(**{**self.defaults, **given})  # type: ignore[arg-type]  # Options checks the values


KEPT: Mapping[str, Value] = {"rank": 4, "embedding_codec": "int8", "whole_codec": "bf16"}
"""How all methods that prune linear weights store what they do not prune."""

METHODS = {
    method.name: method
    for method in (
        Method(
            "weighted",
            of_linears(weighted),
            {"drop": 0.98, "block": 16, "codec": "int2", "seed": 0, **KEPT},
            "Horvitz and Thompson 1952, with the inputs' RMS as in Wanda (arXiv:2306.11695)",
            "random drop",
            needs_profile=True,
        ),
        Method(
            "dare",
            of_linears(dare),
            {"drop": 0.9, "block": 16, "codec": "int4", "seed": 0, **KEPT},
            "DARE (arXiv:2311.03099), columns stratified",
            "random drop",
        ),
        Method(
            "darex",
            of_linears(darex),
            {
                "drop": 0.98,
                "block": 16,
                "codec": "int4",
                "seed": 0,
                **KEPT,
                "judge": "output",
                "per": "model",
            },
            "DAREx-q (arXiv:2410.09344)",
            "random drop",
            tune=search,
        ),
        Method(
            "magnitude",
            of_linears(magnitude),
            {"drop": 0.95, "block": 1, "codec": "int4", **KEPT},
            "Magnitude pruning of deltas as in DAREx (arXiv:2410.09344), with an unbiased scale",
            "importance",
        ),
        Method(
            "wanda",
            of_linears(wanda),
            {"drop": 0.95, "block": 16, "codec": "int4", **KEPT},
            "Wanda (arXiv:2306.11695) on the delta as in DAREx (arXiv:2410.09344), with an unbiased scale",
            "importance",
            needs_profile=True,
            tune=unbiased_outputs,
        ),
        Method(
            "structural",
            of_linears(structural),
            {"drop": 0.9, "unit": "rows", "codec": "int4", "seed": 0, **KEPT},
            "Structural pruning of deltas as in DAREx (arXiv:2410.09344)",
            "structure",
        ),
        Method(
            "low-rank",
            of_linears(low_rank),
            {"linear_rank": 8, **KEPT},
            "ASVD (arXiv:2312.05821), of the delta",
            "low rank",
            needs_profile=True,
        ),
        Method(
            "low-rank-residual",
            of_linears(low_rank_residual),
            {"linear_rank": 1, "drop": 0.98, "block": 16, "codec": "int2", "seed": 0, **KEPT},
            "ASVD (arXiv:2312.05821) plus weighted drop of the rest",
            "low rank and random drop",
            needs_profile=True,
        ),
        Method(
            "dense",
            of_linears(dense),
            {"codec": "sign", **KEPT},
            "BitDelta (arXiv:2402.10193), with an unbiased scale a row",
            "few bits",
        ),
        Method(
            "dense-residual",
            of_linears(dense_residual),
            {"drop": 0.5, "block": 16, "codec": "sign", "seed": 0, **KEPT},
            "BitDelta (arXiv:2402.10193) plus weighted drop of the rest",
            "few bits and random drop",
            needs_profile=True,
        ),
        Method("lora", lora, {}, "LoRA (arXiv:2106.09685)", "factors", for_checkpoints=False),
        Method(
            "lora-darex",
            lora_darex,
            {"drop": 0.5, "codec": "int4", "seed": 0, "judge": "output", "per": "model"},
            "DAREx-q (arXiv:2410.09344) on the factors of LoRA (arXiv:2106.09685)",
            "factors",
            tune=search,
            for_checkpoints=False,
        ),
        Method("lossless", lossless, {}, "BitX in ZipLLM (arXiv:2505.06252)", "bits", for_adapters=False),
    )
}


def method(name: str) -> Method:
    """The row of this name. Raises OptionError that lists the known ones."""
    if name not in METHODS:
        raise OptionError(f"Unknown method {name!r}; known are: {', '.join(METHODS)}")
    return METHODS[name]
