"""The guides hold: their Python runs, their sample files import, and their links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ndp_gym.commands.trace.make import FORMATS as OFFERED
from ndp_gym.evaluation import evaluate
from ndp_gym.importers import FORMATS, ImportOptions, import_trace
from ndp_gym.importers.source import open_source
from ndp_gym.plan import Plan
from ndp_gym.policy import Observation, PolicyContext, resolve

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\S+)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SAMPLES = {
    kind: text
    for kind, text in BLOCK.findall((ROOT / "docs/traces.md").read_text())
    if kind != "python"
}
EXCERPTS = ("hdmoe",)  # a whole file of this format is hundreds of rows
CITING = [
    *PAGES,
    *(
        path
        for name in ("ndp_gym", "policies", "train", "traces")
        for path in ROOT.glob(f"{name}/**/*.py")
    ),
    *(ROOT / "ndp_gym").glob("**/*.toml"),
    *(ROOT / "ndp_gym/validation").glob("*.csv"),
]
CITED = re.compile(r"([\w./-]*\w\.md)\b`{0,2}(?: (?:§ ?|sections? )?(\d+(?:\.\d+)?))?")
UPSTREAM = {"AMX.md", "ROUTER_TRACE_SCHEMA.md", "experts-sched-Tutorial.md", "speed_benchmark.md"}


@pytest.mark.parametrize("page", ["README.md", "docs/policy.md", "docs/traces.md", "docs/train.md"])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.argsort(np.random.default_rng(0).random((40, 16, 64)), axis=2)[:, :, :8]
    np.save("routed_experts.npy", ids.astype(np.uint8))
    blocks = [text for kind, text in BLOCK.findall((ROOT / page).read_text()) if kind == "python"]
    assert blocks
    scope: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        named = re.match(r"# (\w+\.py)\n", block)
        if named:
            Path(named[1]).write_text(block)
        else:
            exec(compile(block, page, "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def unfollowable(text: str) -> list[str]:
    """Pages that a text names but the repository lacks, and section numbers that a page lacks."""
    wrong = []
    for name, section in CITED.findall(text):
        if name in UPSTREAM or name.startswith("runs/"):  # other repositories', and yet to be made
            continue
        found = [page for at in (".", "docs", "traces") if (page := ROOT / at / name).exists()]
        if not found:
            wrong.append(name)
        elif section and not re.search(rf"^#+ {re.escape(section)}\b", found[0].read_text(), re.M):
            wrong.append(f"{name} {section}")
    return wrong


def test_cited_pages_and_sections_exist() -> None:
    assert len(CITING) > 200
    wrong = {path.name: found for path in CITING if (found := unfollowable(path.read_text()))}
    assert not wrong


def test_a_page_or_section_that_does_not_exist_is_found() -> None:
    assert unfollowable("see hardware.md 2.2, (``docs/model.md`` section 6), AMX.md") == [
        "hardware.md"
    ]
    assert unfollowable("validation.md §3, docs/model.md section 11") == [
        "validation.md 3", "docs/model.md 11",
    ]  # fmt: skip


def test_the_observation_has_the_shapes_that_the_policy_page_says() -> None:
    table = re.findall(r"^\| (`.*`) \| \[(.*?)\] \|", (ROOT / "docs/policy.md").read_text(), re.M)
    sizes = {"L": 8, "E": 64}  # the bundled recording
    said = {
        name: tuple(sizes[n] if n in sizes else int(n) for n in shape.split(", "))
        for names, shape in table
        for name in re.findall(r"`(\w+)`", names)
    }
    shapes = {}

    class Asks:
        def reset(self, context: PolicyContext) -> None:
            self.policy = resolve("ema")()
            self.policy.reset(context)

        def __call__(self, observation: Observation) -> Plan:
            shapes.update({name: array.shape for name, array in observation.items()})
            return self.policy(observation)

    evaluate(Asks, split="val", max_windows=1)
    assert said == shapes


def test_every_format_has_a_section() -> None:
    sections = re.findall(r"^### `(\S+)`$", (ROOT / "docs/traces.md").read_text(), re.M)
    assert set(sections) == set(FORMATS) == set(OFFERED)


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_files_are_what_they_say(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    path.write_text(SAMPLES[name])
    found = [kind for kind, module in FORMATS.items() if module.detects(open_source(path))]
    assert found[0] == name
    if name not in EXCERPTS:
        result = import_trace([path], options=ImportOptions(top_k=2))
        assert (result.format, result.trace.n_rows, result.trace.top_k) == (
            name, 3 if name == "megatron" else 2, 2,
        )  # fmt: skip
