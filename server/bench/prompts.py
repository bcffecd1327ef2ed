"""What each request says: lines of a file in turn, or random words that no prefix cache has seen."""

import random
from itertools import cycle, islice
from pathlib import Path

from deltaserve.delta_store.errors import OptionError

# Short and common, so that most tokenisers make about one token of each.
WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power
hour game line end member law car city community name
"""


def prompts_from_file(path: Path, count: int) -> list[str]:
    """``count`` prompts, one a line of a UTF-8 file, from the top again if it has fewer; blank lines do not count."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read prompts from {path}: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise OptionError(f"{path} has no prompt; write one a line")
    return list(islice(cycle(prompts), count))


def word_range(text: str) -> tuple[int, int]:
    """``"32"`` or ``"8:128"``: the fewest and the most words of a prompt. Raises OptionError."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or not (high.isdecimal() or not colon) or not 0 < int(low) <= int(high or low):
        raise OptionError(f"--prompt-words {text} is no length; write WORDS or LOW:HIGH, such as 32 or 8:128")
    return int(low), int(high or low)


def random_prompts(words: int | tuple[int, int], count: int, seed: int, shared_prefix: int = 0) -> list[str]:
    """``count`` prompts of random words, after ``shared_prefix`` words that all of them begin with.

    ``words`` is their number, or the least and the greatest, each in between as likely. The same seed gives the same
    prompts.
    """
    low, high = (words, words) if isinstance(words, int) else words
    generator = random.Random(seed)
    vocabulary = WORDS.split()
    prefix = generator.choices(vocabulary, k=shared_prefix)
    # No draw where there is nothing to draw, so that prompts of one length stay those of earlier versions.
    lengths = (low if low == high else generator.randint(low, high) for _ in range(count))
    return [" ".join(prefix + generator.choices(vocabulary, k=length)) for length in lengths]
