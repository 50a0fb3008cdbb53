"""Five domains of training text that a Python installation carries; knows nothing of tokens.

Everything is drawn from installed files with fixed seeds, so the same installation gives the same
text. Other versions of Python, numpy or torch give other text: hence the shipped weights.
"""

import ast
import hashlib
import random
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

DOMAINS = ("code", "api", "ref", "legal", "data")
HELD_OUT_SHARE = {"code": 1 / 12, "api": 1 / 12, "ref": 1 / 8, "legal": 1 / 8, "data": 1 / 12}

_SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages")
)
_SKIPPED_NAMES = ("CJK", "HANGUL", "EGYPTIAN", "CUNEIFORM", "ANATOLIAN")
_NAMES_PER_LIST = 64
_LEGAL_DOCUMENT_CHARS = 3000
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Domain:
    """ASCII documents of one domain: ``train`` for the weights, ``held_out`` for prompts."""

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


def load_domains(seed: int = 0, max_documents: int | None = None) -> list[Domain]:
    """All five domains in the order of ``DOMAINS``; documents shuffled by ``seed``.

    Args:
        seed: Of every shuffle.
        max_documents: Keep at most this many documents of a domain (for tests); None keeps all.

    Raises:
        ValueError: If a domain has fewer than two documents on this machine.
    """
    makers: dict[str, Callable[[], Iterable[str]]] = {
        "code": lambda: code_documents(_sources(max_documents)),
        "api": lambda: api_documents(seed, max_documents),
        "ref": ref_documents,
        "legal": legal_documents,
        "data": lambda: data_documents(seed),
    }
    return [_split(name, makers[name](), seed, max_documents) for name in DOMAINS]


def _split(name: str, documents: Iterable[str], seed: int, max_documents: int | None) -> Domain:
    kept = [to_ascii(d).strip() for d in documents]
    kept = list(dict.fromkeys(d for d in kept if len(d) > 80))  # no text in both parts
    if len(kept) < 2:
        raise ValueError(f"domain {name!r} needs at least 2 documents, found {len(kept)}")
    random.Random(f"{seed}/{name}").shuffle(kept)
    kept = kept[:max_documents]
    n_held_out = max(1, round(len(kept) * HELD_OUT_SHARE[name]))
    return Domain(name=name, train=tuple(kept[n_held_out:]), held_out=tuple(kept[:n_held_out]))


def to_ascii(text: str) -> str:
    """``text`` with every character outside printable ASCII and newline replaced by ``?``."""
    return re.sub(r"[^\n -~]", "?", text.expandtabs(4).replace("\r\n", "\n"))


def _sources(limit: int | None) -> list[Path]:
    """Files of the standard library, in a fixed order (the first ``limit`` of them)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p.relative_to(root) for p in root.rglob("*.py"))
    kept = sorted(p for p in files if not _SKIPPED_FOLDERS & set(p.parts))
    return [root / p for p in kept[:limit]]


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return None


def _documented(tree: ast.Module) -> Iterator[tuple[_Documented, str]]:
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (doc := ast.get_docstring(node)) is not None:
            yield node, doc


def code_documents(files: Iterable[Path]) -> Iterator[str]:
    """One document per source file, without docstrings and comments."""
    for path in files:
        if (tree := _parse(path)) is None:
            continue
        for node, _ in _documented(tree):
            node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def api_documents(seed: int, limit: int | None = None) -> Iterator[str]:
    """One document per source file: its longer docstrings (standard library, numpy, torch)."""
    for path in _sources(limit):
        yield _docstrings(path, 80)
    for package in ("numpy", "torch"):
        root = Path(sysconfig.get_paths()["purelib"]) / package
        files = sorted(p.relative_to(root) for p in root.rglob("*.py"))
        files = [p for p in files if not _SKIPPED_FOLDERS & set(p.parts)]
        random.Random(f"{seed}/{package}").shuffle(files)
        for relative in files[: limit or 900]:
            yield _docstrings(root / relative, 200)


def _docstrings(path: Path, min_chars: int) -> str:
    tree = _parse(path)
    if tree is None:
        return ""
    return "\n\n".join(doc for _, doc in _documented(tree) if len(doc) > min_chars)


def ref_documents() -> Iterator[str]:
    """The language reference behind ``help()``, one document per topic."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _licence_files() -> list[Path]:
    paths = sysconfig.get_paths()
    site, stdlib = Path(paths["purelib"]), Path(paths["stdlib"])
    found = [p for p in site.rglob("*") if re.match(r"(LICEN[CS]E|COPYING|NOTICE)", p.name, re.I)]
    found += [stdlib / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"]
    found += Path("/usr/share/common-licenses").glob("*")
    return [p for p in sorted(found) if p.is_file() and p.suffix not in (".py", ".pyc")]


def legal_documents() -> Iterator[str]:
    """Licence files of the installation; a paragraph that was seen before is left out."""
    seen: set[str] = set()
    for path in _licence_files():
        paragraphs: list[str] = []
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8", errors="replace")):
            letters = re.sub(r"[^a-z]", "", paragraph.lower())
            digest = hashlib.md5(letters.encode(), usedforsecurity=False).hexdigest()
            if len(letters) > 20 and digest not in seen:
                seen.add(digest)
                paragraphs.append(paragraph.strip("\n"))
            if sum(map(len, paragraphs)) > _LEGAL_DOCUMENT_CHARS:
                yield "\n\n".join(paragraphs)
                paragraphs = []
        yield "\n\n".join(paragraphs)


def data_documents(seed: int) -> Iterator[str]:
    """Lists of 64 code points with their names: four different shuffles of all of them.

    Held-out lists are new orders of names that training has seen, not new names.
    """
    rows = []
    for code in range(0x1F000):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(_SKIPPED_NAMES):
            rows.append(f"{code:04X} {name}")
    for turn in range(4):
        random.Random(f"{seed}/names/{turn}").shuffle(rows)
        for start in range(0, len(rows), _NAMES_PER_LIST):
            yield "\n".join(rows[start : start + _NAMES_PER_LIST])
