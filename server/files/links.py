"""One file under a second name, without a copy where the file system allows it."""

import os
import shutil
from pathlib import Path


def link(file: Path, name: Path) -> None:
    """Give ``file`` the second name; its bytes stay as long as either name does."""
    try:
        os.link(file, name)
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, name)
