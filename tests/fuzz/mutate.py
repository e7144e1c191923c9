"""Inputs made from good ones, by a seed: what a guest, an engine or a broken tool could turn them into."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

_NUMBERS = (b"0", b"-1", b"511", b"4294967296", b"9223372036854775808", b"1e400", b"9" * 300)
_PIECES = (b"\0", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b"\r\n", b" : ", b"'", b'"', b"{", b"[" * 50, b"../")
MOST = 64 << 10  # bytes


def mutated(rng: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of `seeds` after some changes; `words` mean something to whoever reads it."""
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 2, 3, 8, 20))):
        data = rng.choice(_CHANGES)(rng, data, seeds, (*words, *_PIECES, *_NUMBERS))[:MOST]
    return data


Change = Callable[[random.Random, bytes, Sequence[bytes], Sequence[bytes]], bytes]


def _cut(rng: random.Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(rng: random.Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _without(rng: random.Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _twice(rng: random.Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _moved(rng: random.Random, data: bytes, _seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    rest = data[:start] + data[end:]
    at = rng.randrange(len(rest) + 1)
    return rest[:at] + data[start:end] + rest[at:]


def _word(rng: random.Random, data: bytes, _seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + rng.choice(words) + data[rng.choice((start, end)) :]


def _spliced(rng: random.Random, data: bytes, seeds: Sequence[bytes], _words: Sequence[bytes]) -> bytes:
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _span(rng: random.Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 40, 400)))


_CHANGES: tuple[Change, ...] = (_cut, _flip, _flip, _without, _twice, _moved, _word, _word, _spliced)
