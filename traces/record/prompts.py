"""The prompts file: one JSON object per line; knows tokens and conversations, nothing of models."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ndp_gym.trace_file import parse_json
from ndp_gym.trace_requests import MIN_SPLIT_CONVERSATIONS
from ndp_gym.trace_spans import MIN_SPAN
from traces.record.generate import TokenArray

_KEYS = {"prompt", "messages", "conversation", "domain"}
Encode = Callable[[str | list[dict[str, str]]], Sequence[int]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What one request begins with.

    Attributes:
        tokens: ``[S]``, at least one.
        conversation: Prompts with the same text here are turns of one conversation.
        domain: What it is about.
        index: Place in the file, from 0.
    """

    tokens: TokenArray
    conversation: str
    domain: str
    index: int

    @property
    def digest(self) -> str:
        """What tells whether a request of an earlier run answered this very prompt."""
        text = f"{self.index}\n{self.conversation}\n{self.domain}\n{self.tokens.tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a prompts file, checked; blank lines are skipped.

    Raises:
        ValueError: Malformed; names file, line, field and value.
        OSError: It cannot be read.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            value = parse_json(line, where)
            _check(where, value)
            lines.append({**value, "line": number})
    if not lines:
        raise ValueError(f"{path}: must hold at least one prompt")
    return lines


def needs_tokenizer(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any prompt is text or messages rather than token ids."""
    return any("messages" in line or isinstance(line["prompt"], str) for line in lines)


def encode_all(
    path: Path,
    lines: Sequence[Mapping[str, Any]],
    encode: Encode,
    *,
    vocabulary_size: int,
    max_tokens: int | None,
    n_new: int,
) -> list[Prompt]:
    """The prompts as tokens.

    Args:
        path: Their file, for messages.
        lines: Result of ``read_lines``.
        encode: Tokens of a text or of a list of messages.
        vocabulary_size: Token ids must be smaller.
        max_tokens: Longest sequence of the model, if it says so.
        n_new: Tokens that will be generated.

    Raises:
        ValueError: A prompt is empty, too long, or holds unknown tokens; names the line.
    """
    prompts = []
    for index, line in enumerate(lines):
        where = f"{path}: line {line['line']}"
        content = line["messages"] if "messages" in line else line["prompt"]
        raw = content if _is_tokens(content) else encode(content)
        tokens = np.array(raw, dtype=np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"{where}: prompt must have at least one token, got none")
        if not 0 <= tokens.min() <= tokens.max() < vocabulary_size:
            bad = tokens[(tokens < 0) | (tokens >= vocabulary_size)][0]
            raise ValueError(f"{where}: tokens must be in 0..{vocabulary_size - 1}, got {bad}")
        if max_tokens is not None and len(tokens) + n_new > max_tokens:
            raise ValueError(
                f"{where}: prompt and answer must have at most {max_tokens} tokens together, "
                f"got {len(tokens)} + {n_new}"
            )
        conversation = f"line {line['line']}"
        if "conversation" in line:
            conversation = f"named {line['conversation']}"
        domain = line.get("domain", "unknown")
        prompts.append(Prompt(tokens=tokens, conversation=conversation, domain=domain, index=index))
    return prompts


def check_shared_starts(path: Path, prompts: Sequence[Prompt], drop_prefix: int) -> None:
    """Refuse what would put the same text into two splits: a template in front of every prompt.

    Raises:
        ValueError: Prompts of two conversations share their first 64 recorded tokens, in a
            recording that is large enough for splits; says how many tokens to drop.
    """
    if len({p.conversation for p in prompts}) < MIN_SPLIT_CONVERSATIONS:
        return
    seen: dict[bytes, Prompt] = {}
    for prompt in prompts:
        recorded = prompt.tokens[drop_prefix : drop_prefix + MIN_SPAN]
        if len(recorded) < MIN_SPAN:
            continue
        other = seen.setdefault(recorded.tobytes(), prompt)
        if other.conversation == prompt.conversation:
            continue
        n = min(len(other.tokens), len(prompt.tokens))
        same = np.cumprod(other.tokens[:n] == prompt.tokens[:n]).sum()
        raise ValueError(
            f"{path}: prompts {other.index + 1} and {prompt.index + 1} share their first {same} "
            f"tokens but not their conversation: name one conversation, or leave a shared template "
            f"out with --drop-prefix {same}"
        )


def _check(where: str, value: Any) -> None:
    if not isinstance(value, dict) or set(value) - _KEYS:
        got = sorted(set(value) - _KEYS) if isinstance(value, dict) else type(value).__name__
        raise ValueError(
            f"{where}: must be an object with prompt or messages, conversation and domain, "
            f"got {got!r:.80}"
        )
    if ("prompt" in value) == ("messages" in value):
        raise ValueError(f"{where}: must hold prompt or messages, one of the two")
    if "prompt" in value and not (isinstance(value["prompt"], str) or _is_tokens(value["prompt"])):
        raise ValueError(
            f"{where}: prompt must be a text or a list of token ids, got {value['prompt']!r:.80}"
        )
    if "messages" in value and not _is_messages(value["messages"]):
        raise ValueError(
            f"{where}: messages must be a list of objects with the texts role and content, "
            f"got {value['messages']!r:.80}"
        )
    if not isinstance(value.get("domain", ""), str):
        raise ValueError(f"{where}: domain must be a text, got {value['domain']!r:.80}")
    conversation = value.get("conversation", "")
    if not isinstance(conversation, str) and type(conversation) is not int:
        raise ValueError(
            f"{where}: conversation must be a text or a number, got {conversation!r:.80}"
        )


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and abs(v) < 2**31 for v in value)


def _is_messages(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(m, dict)
            and set(m) == {"role", "content"}
            and all(isinstance(v, str) for v in m.values())
            for m in value
        )
    )
