"""UUIDs as oVirt writes them: 36 characters, lower case, with dashes; the only names of local disks."""

from __future__ import annotations

import re

_CANONICAL = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def is_uuid(text: object) -> bool:
    """Whether `text` is a string that is a canonical lower-case UUID and nothing else."""
    return isinstance(text, str) and _CANONICAL.fullmatch(text) is not None
