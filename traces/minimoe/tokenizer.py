"""A small byte-pair vocabulary over ASCII, learned and applied in plain Python."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

SEPARATOR = 0
N_CHARACTERS = 128
VOCABULARY_SIZE = 1024

_PIECE = re.compile(r" ?[A-Za-z]+|\d{1,3}| ?[^\sA-Za-z\d]{1,4}|\n *|\s+")
_Pair = tuple[int, int]


class Tokenizer:
    """Maps text to tokens and back; token 0 separates documents, 1..127 are ASCII characters."""

    def __init__(self, merges: Iterable[_Pair]) -> None:
        """Build from ``merges``: pair ``i`` becomes token ``128 + i``; the order is the priority.

        Raises:
            ValueError: If a pair names a token that does not exist yet.
        """
        self.merges = [(int(a), int(b)) for a, b in merges]
        self._rank = {pair: i for i, pair in enumerate(self.merges)}
        self._text = [chr(c) for c in range(N_CHARACTERS)]
        self._cache: dict[str, list[int]] = {}
        for a, b in self.merges:
            if not 0 <= min(a, b) <= max(a, b) < len(self._text):
                raise ValueError(f"merges must name tokens below {len(self._text)}, got {(a, b)}")
            self._text.append(self._text[a] + self._text[b])

    def encode(self, text: str) -> list[int]:
        """Tokens of ASCII ``text`` (any other character is a ``ValueError``)."""
        if not text.isascii():
            raise ValueError("text must be ASCII")
        tokens: list[int] = []
        for piece in _PIECE.findall(text):
            if piece not in self._cache:
                self._cache[piece] = self._encode_piece(piece)
            tokens += self._cache[piece]
        return tokens

    def _encode_piece(self, piece: str) -> list[int]:
        tokens = [ord(c) for c in piece]
        last = len(self.merges)
        while len(tokens) > 1:
            rank = min(self._rank.get(pair, last) for pair in pairwise(tokens))
            if rank == last:
                break
            tokens = _merge(tokens, self.merges[rank], N_CHARACTERS + rank)
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ``tokens``; the separator reads as NUL."""
        return "".join(self._text[int(t)] for t in tokens)

    def stream(self, documents: Iterable[str]) -> npt.NDArray[np.uint16]:
        """All ``documents`` in one array, the separator before each."""
        tokens: list[int] = []
        for document in documents:
            tokens.append(SEPARATOR)
            tokens += self.encode(document)
        return np.array(tokens, dtype=np.uint16)


def _merge(tokens: Sequence[int], pair: _Pair, new: int) -> list[int]:
    merged: list[int] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] = new
        else:
            merged.append(token)
    return merged


def learn_merges(
    texts: Iterable[str], n_merges: int = VOCABULARY_SIZE - N_CHARACTERS, n_pieces: int = 12_000
) -> list[_Pair]:
    """Byte-pair merges of the ``n_pieces`` commonest pieces (Sennrich et al. 2016, algorithm 1).

    Ties go to the smaller pair, so the result does not depend on the order of counting. Fewer
    merges are returned if no pair occurs twice.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_PIECE.findall(text))
    commonest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n_pieces]
    words = [[ord(c) for c in piece] for piece, _ in commonest]
    weight = [n for _, n in commonest]
    pairs: Counter[_Pair] = Counter()
    where: defaultdict[_Pair, set[int]] = defaultdict(set)

    def count(i: int, sign: int) -> None:
        for pair in pairwise(words[i]):
            pairs[pair] += sign * weight[i]
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    merges: list[_Pair] = []
    while len(merges) < n_merges:
        best = max(pairs, key=lambda p: (pairs[p], -p[0], -p[1]), default=None)
        if best is None or pairs[best] < 2:
            break
        for i in where.pop(best):
            count(i, -1)
            words[i] = _merge(words[i], best, N_CHARACTERS + len(merges))
            count(i, 1)
        del pairs[best]
        merges.append(best)
    return merges
