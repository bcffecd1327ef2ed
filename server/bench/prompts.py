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


def random_prompts(words: int, count: int, seed: int) -> list[str]:
    """``count`` prompts of ``words`` random words; the same seed gives the same prompts."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS.split(), k=words)) for _ in range(count)]
