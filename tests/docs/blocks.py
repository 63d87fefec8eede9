"""Blocks of a document that are written from the code, between two comments that name them."""

from __future__ import annotations

import re


def replaced(text: str, name: str, content: str) -> str:
    """`text` with the block called `name` written anew."""
    begin, end = rf"<!-- {name}: begin [^>]*-->\n", rf"<!-- {name}: end -->"
    return re.sub(rf"({begin}).*?({end})", lambda m: m[1] + content + m[2], text, flags=re.DOTALL)
