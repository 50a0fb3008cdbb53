"""The request table of a routing trace and the train/val/test split by conversation.

It knows rows and requests, nothing of files, experts or time.
"""

import hashlib
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
COLUMNS = ("start", "n_prompt", "length", "context_offset", "conversation", "domain", "split")
MIN_SPLIT_CONVERSATIONS = 16
_SPLIT_PATTERN = (0, 1, 0, 2)  # 50 % train, 25 % val, 25 % test


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """One row per recorded request; every column is an int64 array ``[R]``.

    Rows ``start .. start + length`` of the trace belong to the request: first ``n_prompt`` prefill
    rows, then the decode rows. Requests are in order of ``start`` and never overlap.

    Attributes:
        start: First row in the trace.
        n_prompt: Prefill rows, 0..length.
        length: All rows, at least 1.
        context_offset: Tokens before the first row that were not recorded.
        conversation: Requests that share text (turns) share this id.
        domain: Index into ``domains``.
        split: Index into ``SPLITS`` (0 train, 1 val, 2 test).
        domains: Names of the domains.
    """

    start: IntArray
    n_prompt: IntArray
    length: IntArray
    context_offset: IntArray
    conversation: IntArray
    domain: IntArray
    split: IntArray
    domains: tuple[str, ...]

    def __len__(self) -> int:
        """Number of requests."""
        return int(self.start.shape[0])

    @property
    def n_decode(self) -> IntArray:
        """Decode rows per request ``[R]``; 0 for a request that was only prefilled."""
        return self.length - self.n_prompt

    @property
    def end(self) -> IntArray:
        """Row after the last one, per request ``[R]``."""
        return self.start + self.length

    @property
    def n_conversations(self) -> int:
        """Number of distinct conversations."""
        return int(np.unique(self.conversation).shape[0])

    @property
    def evaluation_only(self) -> bool:
        """Whether there are too few conversations for a train/val/test split."""
        return self.n_conversations < MIN_SPLIT_CONVERSATIONS

    def domain_names(self) -> list[str]:
        """Name of the domain of every request."""
        return [self.domains[i] for i in self.domain]

    def table(self) -> IntArray:
        """All columns as one array ``[R, 7]`` in the order of ``COLUMNS``."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1)

    @classmethod
    def from_table(cls, table: IntArray, domains: tuple[str, ...]) -> "Requests":
        """The table ``[R, 7]`` as columns (read-only copies)."""
        columns = {}
        for index, name in enumerate(COLUMNS):
            column = np.array(table[:, index], dtype=np.int64)
            column.flags.writeable = False
            columns[name] = column
        return cls(**columns, domains=domains)

    def with_splits(self, seed: int) -> "Requests":
        """The same requests with splits assigned anew by ``assign_splits``."""
        return replace(self, split=assign_splits(self.conversation, self.domain, seed=seed))

    def check(self, n_rows: int, name: str) -> None:
        """Raise one ``ValueError`` naming the field and value that is wrong.

        Args:
            n_rows: Rows T of the trace.
            name: What to call the trace in the message (usually its file).
        """
        self._check_shapes(name)
        _require(
            name, "start", self.start, (self.start >= 0) & (self.start < n_rows), f"0..{n_rows - 1}"
        )
        _require(
            name,
            "length",
            self.length,
            (self.length >= 1) & (self.length <= n_rows),
            f"1..{n_rows}",
        )
        _require(
            name, "length", self.length, self.end <= n_rows, f"such that start+length <= {n_rows}"
        )
        in_request = (self.n_prompt >= 0) & (self.n_prompt <= self.length)
        _require(name, "n_prompt", self.n_prompt, in_request, "0..length")
        within = (self.context_offset >= 0) & (self.context_offset < 2**40)
        _require(name, "context_offset", self.context_offset, within, "0..2**40-1")
        _require(name, "conversation", self.conversation, self.conversation >= 0, ">= 0")
        known = (self.domain >= 0) & (self.domain < len(self.domains))
        _require(name, "domain", self.domain, known, f"0..{len(self.domains) - 1} (see domains)")
        _require(name, "split", self.split, (self.split >= 0) & (self.split <= 2), "0..2")
        after = np.concatenate([[True], self.start[1:] >= self.end[:-1]])
        _require(name, "start", self.start, after, "at or after the end of the request before it")
        self._check_splits(name)

    def _check_shapes(self, name: str) -> None:
        n_requests = self.start.shape[0] if self.start.ndim == 1 else -1
        if n_requests < 1:
            raise ValueError(
                f"{name}: requests must hold at least one request, got shape {self.start.shape}"
            )
        for field in fields(self):
            if field.name == "domains":
                continue
            column = getattr(self, field.name)
            if column.shape != (n_requests,) or column.dtype != np.int64:
                raise ValueError(
                    f"{name}: requests.{field.name} must be int64 [{n_requests}], "
                    f"got {column.dtype} {list(column.shape)}"
                )

    def _check_splits(self, name: str) -> None:
        pairs = np.unique(np.stack([self.conversation, self.split], axis=1), axis=0)
        ids, counts = np.unique(pairs[:, 0], return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{name}: requests.split must be the same for all requests of a conversation, "
                f"got several splits for conversation {ids[counts > 1][0]}"
            )
        if len(ids) < MIN_SPLIT_CONVERSATIONS and (self.split != 2).any():
            raise ValueError(
                f"{name}: requests.split must be 2 (test) in a recording with fewer than "
                f"{MIN_SPLIT_CONVERSATIONS} conversations, got {self.split[self.split != 2][0]}"
            )


def _require(
    name: str, column: str, values: IntArray, ok: npt.NDArray[np.bool_], rule: str
) -> None:
    if ok.all():
        return
    bad = int(np.flatnonzero(~ok)[0])
    raise ValueError(
        f"{name}: requests.{column} of request {bad} must be {rule}, got {values[bad]}"
    )


def assign_splits(conversation: IntArray, domain: IntArray, *, seed: int) -> IntArray:
    """Split code per request ``[R]``: 50 % train, 25 % val, 25 % test of the conversations.

    Conversations are ordered by domain and inside a domain by a hash of (seed, conversation), then
    dealt out in the fixed pattern train, val, train, test that runs on from domain to domain: exact
    overall and, to within one conversation per split, in every domain. A conversation in several
    domains counts for the first. With fewer than 16 conversations everything is test.
    """
    ids, first = np.unique(conversation, return_index=True)
    if len(ids) < MIN_SPLIT_CONVERSATIONS:
        return np.full(conversation.shape, 2, dtype=np.int64)
    order = sorted(
        range(len(ids)),
        key=lambda i: (int(domain[first[i]]), hashlib.sha256(f"{seed}:{ids[i]}".encode()).digest()),
    )
    split_of = np.empty(len(ids), dtype=np.int64)
    for position, index in enumerate(order):
        split_of[index] = _SPLIT_PATTERN[position % len(_SPLIT_PATTERN)]
    return split_of[np.searchsorted(ids, conversation)]
