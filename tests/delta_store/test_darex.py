"""DAREx-q: the search finds optima that are known, is what the formulas say, and ends in the artifact."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import fine_tuned, save, tiny_gpt2, tiny_llama
from transformers import BertConfig, BertModel

from deltaserve.delta_store.calibration import is_linear
from deltaserve.delta_store.checkpoint import open_checkpoint
from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.codec.specs import SparseSpec
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.errors import OptionError
from deltaserve.delta_store.fine_tune import open_fine_tune
from deltaserve.delta_store.merge import variant_tensors
from deltaserve.delta_store.pruning import darex
from deltaserve.delta_store.pruning.darex import minimise, multiples, search, shares
from deltaserve.delta_store.pruning.options import Options, Value
from deltaserve.delta_store.pruning.tuning import pruned_part
from deltaserve.delta_store.quality import loss, output_change, outputs
from deltaserve.delta_store.running.layers import Layerwise
from deltaserve.delta_store.running.memory import Runner
from deltaserve.delta_store.running.weights import of_artifact, of_fine_tune
from deltaserve.delta_store.running.whole import Whole
from deltaserve.delta_store.text import Sample

pytestmark = pytest.mark.usefixtures("own_cache")

SAMPLES = [Sample((1, 5, 9, 23, 40, 63, 2, 17, 8, 8, 31), 3), Sample((4, 4, 31, 8, 50, 12))]
DARE: dict[str, Value] = {"drop": 0.75, "block": 1, "codec": "float32"}
LARGE = 0.15
"""Standard deviation of a delta so large that dividing by 1 - p is not best."""


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(fine_tuned(tiny_llama(), scale=LARGE), tmp_path_factory.mktemp("fine"), vocab=64)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


def divisors(artifact: Path) -> dict[str, float]:
    opened = open_artifact(artifact)
    specs = {name: opened.specs(name)[0] for name in opened.names}
    return {name: spec.divisor for name, spec in specs.items() if isinstance(spec, SparseSpec)}


@pytest.mark.parametrize("optimum", [0.004, 0.07, 0.9, 1.0, 6.0, 300.0])
def test_the_search_finds_a_known_optimum(optimum: float) -> None:
    tried: list[float] = []

    def score(eta: float) -> float:
        tried.append(eta)
        return abs(math.log((eta + 1e-9) / optimum))

    assert minimise(score, 1e-3) == pytest.approx(optimum, rel=0.1)
    assert len(tried) == len(set(tried)) <= 20


@pytest.mark.parametrize("score", [lambda eta: eta, lambda eta: 1.0])
def test_where_no_bias_helps_the_search_ends_at_dare(score: Callable[[float], float]) -> None:
    assert minimise(score, 1e-3) == 0
    assert minimise(score, math.inf) == 0


def test_a_hill_between_dare_and_the_start_does_not_end_the_search() -> None:
    """From a fifth of the start on everything is worse than DARE; the least lies between."""
    found = minimise(lambda eta: abs(math.log((eta + 0.02) / 0.07)), 1e-3)
    assert found == pytest.approx(0.05, rel=0.2)


def test_q_is_the_closed_form_where_eta_is_one() -> None:
    """q* = (1 - p) + p * rho, at most 1; rho is each layer's own or the whole model's."""
    sums = {"a": (1.0, 100.0), "b": (3.0, 20.0), "unreached": (0.0, 0.0)}
    rho = shares(sums, "layer")
    assert rho == {"a": 0.01, "b": 0.15, "unreached": 0.0}
    assert shares(sums, "model") == dict.fromkeys(sums, 4 / 120)
    by_layer = multiples(rho, 1.0, 0.9)
    assert by_layer == pytest.approx({"a": (0.1 + 0.9 * 0.01) / 0.1, "b": (0.1 + 0.9 * 0.15) / 0.1, "unreached": 1.0})
    assert multiples(rho, 1000.0, 0.9) == pytest.approx({"a": 10, "b": 10, "unreached": 1})
    assert set(multiples(rho, 0.0, 0.9).values()) == {1.0}


@pytest.mark.parametrize("runner", [Whole(), Layerwise()], ids=["whole", "layers"])
@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
def test_noise_shares_are_those_of_the_terms(model: torch.nn.Module, runner: Runner, tmp_path: Path) -> None:
    """Against the definition: c = delta * input for every token, row and column."""
    tuned = fine_tuned(model)  # type: ignore[type-var]
    checkpoint = open_checkpoint(save(model, tmp_path / "base"))  # type: ignore[arg-type]
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, given: tuple[torch.Tensor, ...]) -> None:
        inputs[f"{name}.weight"] = given[0][0]

    for name, module in tuned.named_modules():
        if is_linear(module) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, given, name=name: keep(name, given))
    tune = open_fine_tune(save(tuned, tmp_path / "fine"), checkpoint)
    with torch.no_grad():
        tuned(input_ids=torch.tensor([SAMPLES[0].ids]))
        run = partial(runner.run, of_fine_tune(tune))
        found = darex.noise_and_signal(run, checkpoint, list(inputs), SAMPLES[0])
    assert found.keys() == inputs.keys()
    for name, x in inputs.items():
        delta = tuned.state_dict()[name] - checkpoint.read(name)
        terms = (delta.T if name in checkpoint.architecture.transposed else delta)[None] * x[:, None, :]
        assert found[name] == pytest.approx((terms.square().sum().item(), terms.sum(2).square().sum().item()), rel=1e-4)


@pytest.mark.parametrize(("judge", "per"), [("output", "model"), ("output", "layer"), ("labels", "layer")])
def test_what_it_finds_is_about_the_best_of_a_fine_grid(
    judge: str, per: str, base: Path, fine: Path, tmp_path: Path
) -> None:
    compress(base, fine, tmp_path / "dare", method="dare", options=DARE)
    checkpoint, artifact = open_checkpoint(base), open_artifact(tmp_path / "dare")
    tune = open_fine_tune(fine, checkpoint)
    options = Options(drop=0.75, judge=judge, per=per)
    found = search(checkpoint, tune, artifact, SAMPLES, options, Whole())
    assert search(checkpoint, tune, artifact, SAMPLES, options, Layerwise()) == found
    run = partial(Whole().run, of_fine_tune(tune))
    rho = shares(darex.noise_and_signal(run, checkpoint, list(found), SAMPLES[0]), per)
    wanted = run(SAMPLES, outputs)

    def score(q: dict[str, float]) -> float:
        """Of the artifact's own model, whose survivors are divided in place."""
        model = of_artifact(checkpoint, artifact, None).model()
        for name, parameter in model.named_parameters():
            if name in q:
                parameter += pruned_part(artifact, name) * (1 / q[name] - 1)
        given = [outputs(model, sample) for sample in SAMPLES]
        return loss(given, SAMPLES) if judge == "labels" else output_change(given, wanted)

    with torch.no_grad():
        exponents = range(-6, 4)
        grid = [score(multiples(rho, eta, 0.75)) for eta in (0.0, *(2.0**exponent for exponent in exponents))]
        assert score(found) <= min(grid) + 0.03 * (max(grid) - min(grid))
    if judge == "output":
        assert min(found.values()) > 1


def test_the_artifact_is_dares_with_other_divisors(base: Path, fine: Path, text: Path, tmp_path: Path) -> None:
    dare = compress(base, fine, tmp_path / "dare", method="dare", options=DARE)
    receipt = compress(base, fine, tmp_path / "out", method="darex", options={**DARE, "per": "layer"}, calibration=text)
    before, after = divisors(tmp_path / "dare"), divisors(tmp_path / "out")
    assert receipt.q == (min(after.values()), max(after.values()))
    assert dare.q is None
    checkpoint = open_checkpoint(base)
    original = {name: checkpoint.read(name) for name in checkpoint.names}
    one, other = (dict(variant_tensors(checkpoint, open_artifact(tmp_path / n), None)) for n in ("dare", "out"))
    for name, tensor in original.items():
        ratio = before[name] / after[name] if name in before else 1.0
        torch.testing.assert_close(other[name] - tensor, (one[name] - tensor) * ratio, atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["dare", "out", "text.txt"]


def test_the_same_input_and_seed_give_the_same_file(base: Path, fine: Path, tmp_path: Path) -> None:
    """Without text of one's own the built-in text is read."""
    one, other = (compress(base, fine, tmp_path / n, method="darex", options=DARE).digest for n in ("one", "other"))
    assert one == other
    third = compress(base, fine, tmp_path / "third", method="darex", options={**DARE, "seed": 1})
    assert third.digest != one


def test_an_encoder_is_judged_by_its_hidden_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertModel(config).eval()
    base, fine = save(model, tmp_path / "base"), save(fine_tuned(model, scale=LARGE), tmp_path / "fine")
    receipt = compress(base, fine, tmp_path / "out", method="darex", options=DARE)
    assert receipt.q is not None
    assert receipt.q[0] > 0.25
    with pytest.raises(OptionError, match="BertModel predicts no tokens"):
        compress(base, fine, tmp_path / "no", method="darex", options={"judge": "labels"}, calibration=tmp_path / "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": {"judge": "labels"}}, "To judge by labels, text with answers is needed"),
        ({"options": {"judge": "me"}}, "judge is me; it can be output, labels"),
        ({"options": {"per": "head"}}, "per is head; it can be model, layer"),
        ({"profile": Path("p")}, "darex uses no activation profile"),
        ({"calibration": Path("nowhere.txt")}, "Cannot read the text file nowhere.txt"),
    ],
)
def test_a_refusal_leaves_no_file(
    settings: dict[str, object], message: str, base: Path, fine: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        compress(base, fine, tmp_path / "out", method="darex", **settings)  # type: ignore[arg-type]
    assert not any(path.is_file() for path in tmp_path.iterdir())
