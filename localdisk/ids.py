"""UUIDs as oVirt writes them, which are the names of local disks, and fingerprints of volumes."""

from __future__ import annotations

NOBODY = "00000000-0000-0000-0000-000000000000"  # no VM, image or volume has it
_DIGITS = frozenset("0123456789abcdef")


def new_uuid() -> str:
    """A random UUID."""
    import uuid  # slow to import, and most users of this module make no UUID

    return str(uuid.uuid4())


def uuid_of(name: str, namespace: str) -> str:
    """The UUID of this name in this namespace, which is a UUID itself: always the same."""
    import uuid

    return str(uuid.uuid5(uuid.UUID(namespace), name))


def is_uuid(text: object) -> bool:
    """Whether `text` is a canonical UUID and nothing else: 36 characters, lower case, with dashes."""
    if not isinstance(text, str) or len(text) != 36 or text[8:24:5] != "----":
        return False
    digits = text.replace("-", "")
    return len(digits) == 32 and _DIGITS.issuperset(digits)


def is_fingerprint(text: object) -> bool:
    """Whether `text` is what `hook/fingerprint.py` makes: 32 hexadecimal digits, lower case."""
    return isinstance(text, str) and len(text) == 32 and _DIGITS.issuperset(text)
