"""A whole recording: prompts in batches, rows to disk as they come, a trace file at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ndp_gym.importers.recording import Segment, request_table
from ndp_gym.trace import RoutingTrace
from ndp_gym.trace_loops import loop_free_rows
from ndp_gym.trace_metadata import TraceMetadata
from ndp_gym.trace_requests import Requests
from ndp_gym.trace_spans import find_shared_span
from traces.record.generate import Answer, RoutedModel, Sampling, answer
from traces.record.prompts import Prompt
from traces.record.writer import Parts

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is recorded and how.

    Attributes:
        prompts: One request each.
        sampling: How answers are drawn; request i draws from its own generator (seed, i).
        batch_size: Requests that run together.
        drop_prefix: Rows left out at the start of every request (a template that all share).
        keep_loops: Keep the rows of an answer that repeats itself.
    """

    prompts: Sequence[Prompt]
    sampling: Sampling
    batch_size: int = 1
    drop_prefix: int = 0
    keep_loops: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        shortest = min(len(prompt.tokens) for prompt in self.prompts)
        if not 0 <= self.drop_prefix < shortest:
            raise ValueError(
                f"drop_prefix must be in 0..{shortest - 1} (shortest prompt), "
                f"got {self.drop_prefix}"
            )


def pending(parts: Parts, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without a finished request.

    Raises:
        ValueError: A finished request belongs to none of the prompts.
    """
    done = {entry["digest"] for entry in parts.entries}
    if foreign := len(done - {prompt.digest for prompt in prompts}):
        raise ValueError(
            f"{parts.folder}: {foreign} of {len(done)} finished requests answer prompts that are "
            f"not in the prompts file: give the file they came from, or remove the folder"
        )
    return [prompt for prompt in prompts if prompt.digest not in done]


def record(
    model: RoutedModel,
    job: Job,
    parts: Parts,
    progress: Progress = lambda n_rows, n_spared: None,
) -> None:
    """Record the prompts that ``parts`` lacks, a batch at a time, in the order of the file.

    Args:
        model: The model.
        job: Prompts and settings.
        parts: Where finished requests go.
        progress: Called after every pass with its rows and 0, and after every batch with 0 and the
            rows that were not needed because answers ended early.

    Raises:
        ValueError: See ``generate.answer`` and ``Parts.append``.
    """
    todo = pending(parts, job.prompts)
    for first in range(0, len(todo), job.batch_size):
        batch = todo[first : first + job.batch_size]
        rngs = [np.random.default_rng([job.sampling.seed, prompt.index]) for prompt in batch]
        answers = answer(
            model,
            [prompt.tokens for prompt in batch],
            job.sampling,
            rngs,
            lambda n_rows: progress(n_rows, 0),
        )
        for prompt, answered in zip(batch, answers, strict=True):
            _store(parts, prompt, answered, job)
        n_most = sum(a.n_prompt + job.sampling.n_tokens for a in answers)
        progress(0, n_most - sum(len(a.tokens) for a in answers))


def _store(parts: Parts, prompt: Prompt, answered: Answer, job: Job) -> None:
    n_rows, n_prompt = len(answered.tokens), answered.n_prompt
    kept = n_rows
    if not job.keep_loops and n_rows > n_prompt:
        kept = n_prompt + loop_free_rows(answered.expert_ids[n_prompt:])
    entry = {
        "digest": prompt.digest,
        "n_prompt": n_prompt - job.drop_prefix,
        "context_offset": job.drop_prefix,
        "conversation": prompt.conversation,
        "domain": prompt.domain,
        "n_looped": n_rows - kept,
    }
    rows = slice(job.drop_prefix, kept)
    parts.append(answered.expert_ids[rows], answered.gate_weights[rows], entry)


def finish(parts: Parts, metadata: TraceMetadata, path: Path, seed: int) -> RoutingTrace:
    """Write the finished requests as a trace, splits dealt out by conversation.

    Conversations that turn out to share 64 tokens of routing are taken as one, so that no text
    stands in two splits.

    Args:
        parts: At least one finished request.
        metadata: Facts of the recording.
        path: The file to write.
        seed: Of the splits.

    Returns:
        The trace, opened from ``path``.
    """
    names = list(dict.fromkeys(entry["conversation"] for entry in parts.entries))
    number = {name: index for index, name in enumerate(names)}
    segments = [
        Segment(
            n_rows=entry["n_rows"],
            n_prompt=entry["n_prompt"],
            context_offset=entry["context_offset"],
            conversation=number[entry["conversation"]],
            domain=entry["domain"],
        )
        for entry in parts.entries
    ]
    n_looped = sum(entry["n_looped"] for entry in parts.entries)
    extra = {**metadata.extra, "split_seed": seed, "rows_cut_as_loops": n_looped}
    while True:
        table = request_table(segments, seed)
        trace = parts.trace(table, replace(metadata, extra=extra))
        shared = find_shared_span(trace.expert_ids, table)
        if shared is None:
            return trace.save(path)
        segments = _joined(segments, table, shared[0], shared[1])
        extra["conversations_joined"] = extra.get("conversations_joined", 0) + 1


def _joined(segments: list[Segment], table: Requests, row: int, other: int) -> list[Segment]:
    """The segments with the conversations that hold two rows made one."""
    first, second = (
        int(table.conversation[table.start.searchsorted(r, side="right") - 1]) for r in (row, other)
    )
    return [replace(s, conversation=first) if s.conversation == second else s for s in segments]
