"""The rooms of the repository: imports point one way, physics stays pure, files stay readable."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own room and from the rooms above it in this list.
ROOMS = {
    "units": "units rules",
    "specs": "specs",
    "presets": "presets",
    "trace": "trace trace_content trace_counts trace_file trace_loops trace_metadata trace_predict "
    "trace_requests trace_series trace_spans trace_stats synthesize replay replay_kernel importers",
    "quality": "quality quality_file quantizers quantizer_loops checkpoint expert_weights "
    "quality_measure",
    "cost": "cost budget",
    "plan": "plan policy policy_calls predictor bit_ladder forecast fillings window_loops "
    "filling_loops allocation allocation_loops planners",
    "simulate": "kernel_data kernel simulate state outcome outcome_loops packing batch",
    "reward": "reward bound bound_loops exhaustive local_search",
    "env": "schedule condition conditions machines memory lane_loops lanes inputs bounds encoding "
    "decoders episodes env vector wrappers sb3 render env_docs layer_forecast "
    "layer_facts speeds speed_loops layer_features layer_agents agent_file",
    "evaluate": "statistics provenance contenders results rows patterns rollout scenarios "
    "regret explain plan_export plan_targets "
    "evaluation uncertainty charts figure report report_uncertainty tracking "
    "trace_page trace_page_style trace_svg "
    "validation bench bench_large layer_env",
    "cli": "commands cli __main__",
}
RANK = {module: rank for rank, names in enumerate(ROOMS.values()) for module in names.split()}
FIRST_ROOM_AFTER_PHYSICS = list(ROOMS).index("reward")
LEARNING = {"gymnasium", "torch", "stable_baselines3", "sb3_contrib", "wandb"}

# What each top-level folder may import of the others; tests may import everything.
FOLDERS = {
    "ndp_gym": {"ndp_gym"},
    "policies": {"ndp_gym", "policies"},
    "train": {"ndp_gym", "policies", "train", "traces"},
    "traces": {"ndp_gym", "traces"},
    "examples": {"ndp_gym", "policies"},
}
MAX_MODULE_LINES = 450
LONG_MODULES = {"ndp_gym/kernel.py": 700}  # numba caches compiled code by its own file only
MAX_FUNCTION_LINES = 80


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """`ndp_gym/specs/model.py` -> `ndp_gym.specs.model`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(path: Path, *, at_runtime: bool = False) -> Iterator[str]:
    """Dotted names that the file imports anywhere, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if at_runtime:
        tree.body = [node for node in tree.body if not is_type_checking(node)]
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, node.module] if node.module else above)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def module_in_package(dotted: str) -> str | None:
    """`ndp_gym.specs.MoESpec` -> `specs`; None for what is not in ndp_gym."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "ndp_gym" and len(parts) > 1 else None


def room_of(path: Path) -> int:
    return RANK.get(name_of(path).split(".")[1], len(ROOMS))


def modules() -> list[Path]:
    """Every module of the package except its front door, which re-exports from all rooms."""
    return [path for path in sources("ndp_gym") if path != ROOT / "ndp_gym/__init__.py"]


def test_every_module_has_a_room() -> None:
    homeless = {name_of(path).split(".")[1] for path in modules()} - RANK.keys()
    assert not homeless, f"add to ROOMS in {Path(__file__).name}: {sorted(homeless)}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name_of(path)} imports {dotted}"
        for path in modules()
        for dotted in imports_of(path)
        if (target := module_in_package(dotted)) in RANK and RANK[target] > room_of(path)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other_in_circles() -> None:
    known = {name_of(path) for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        targets = {
            d if d in known else d.rpartition(".")[0] for d in imports_of(path, at_runtime=True)
        }
        graph[name_of(path)] = (targets & known) - {name_of(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_physics_knows_neither_gymnasium_nor_torch() -> None:
    wrong = [
        f"{name_of(path)} imports {dotted}"
        for path in modules()
        if room_of(path) < FIRST_ROOM_AFTER_PHYSICS
        for dotted in imports_of(path)
        if dotted.split(".")[0] in LEARNING
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_it_may(folder: str) -> None:
    forbidden = {*FOLDERS, "tests"} - FOLDERS[folder]
    wrong = [
        f"{name_of(path)} imports {dotted}"
        for path in sources(folder)
        for dotted in imports_of(path)
        if dotted.split(".")[0] in forbidden
    ]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in sources(*FOLDERS, "tests"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT).as_posix()
        if (n_lines := text.count("\n")) > LONG_MODULES.get(name, MAX_MODULE_LINES):
            long.append(f"{name}: {n_lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (n_lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {n_lines} lines")
    assert not long, "\n".join(long)
