"""Our prompts are files, so that they can be read, and hashed into every result that they had a part in."""

import hashlib
from functools import cache
from pathlib import Path

_PROMPTS = Path(__file__).parent / "prompts"


@cache  # every request asks for some
def prompt(name: str, kind: str = "txt") -> str:
    """Return one of our prompt files."""
    return (_PROMPTS / f"{name}.{kind}").read_text(encoding="utf-8")


def hashed(text: str) -> str:
    """Return what stands for a prompt in results."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
