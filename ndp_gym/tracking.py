"""Experiment tracking with Weights & Biases: offline unless asked, all in the output folder.

wandb is imported when a run starts. An offline run needs no account and no network; upload it later
with ``wandb sync DIR``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ndp_gym.results import EvaluationResult, Row

if TYPE_CHECKING:
    from wandb import Run, Settings

    from ndp_gym.trace import RoutingTrace

__all__ = ["MODES", "Mode", "log_agent", "log_trace", "track_evaluation", "tracked_run"]

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = get_args(Mode)
_FOLDERS = {"WANDB_DIR": "", "WANDB_DATA_DIR": "wandb/data", "WANDB_CACHE_DIR": "wandb/cache"}
_METRICS = {
    "perf": ("tokens_per_s", "decode_step_p50_s", "decode_step_p99_s", "ttft_s", "load_s",
             "speedup_vs_all_far4", "speedup_vs_all_hbm", "joules_per_token", "reward"),
    "quality": ("delta_nll_nats", "accuracy_drop_points", "mean_bits"),
    "placement": ("hit_rate", "byte_hit_rate", "migration_bytes", "fetch_bytes", "wasted_bytes",
                  "n_repaired"),
}  # fmt: skip


@contextmanager
def tracked_run(
    config: Mapping[str, Any],
    *,
    output_dir: str | os.PathLike[str],
    mode: Mode = "offline",
    project: str = "ndp-gym",
    entity: str | None = None,
    name: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    settings: Settings | None = None,
) -> Iterator[Run]:
    """A wandb run that finishes with the block, with exit code 1 where the block raised.

    ``WANDB_DIR``, ``WANDB_DATA_DIR`` and ``WANDB_CACHE_DIR`` point into ``output_dir`` while it is
    open, each only where the user has not set it. Metrics logged with a ``global_step`` are shown
    over it.

    Args:
        config: what the run is, JSON values.
        output_dir: folder for everything wandb writes.
        mode: ``offline`` (files only), ``online`` (needs an account) or ``disabled`` (nothing).
        project: wandb project.
        entity: wandb user or team.
        name: run name.
        group: groups runs of one sweep.
        job_type: ``evaluate``, ``train`` or the like.
        settings: replaces the quiet defaults.

    Raises:
        ValueError: unknown mode, or an online run without an account.
    """
    if mode not in MODES:
        raise ValueError(f"wandb mode must be one of {', '.join(MODES)}, got {mode!r}")
    with _folders_under(Path(output_dir), mode):
        import wandb

        try:
            run = wandb.init(
                mode=mode,
                dir=os.environ.get("WANDB_DIR"),  # wandb itself reads it once per process
                project=project,
                entity=entity,
                name=name,
                group=group,
                job_type=job_type,
                config=dict(config),
                settings=settings or wandb.Settings(silent=mode != "online", console="off"),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise ValueError(f"wandb {mode} run could not start: {error}") from error
        run.define_metric("*", step_metric="global_step")
        exit_code = 1
        try:
            yield run
            exit_code = 0
        finally:
            run.finish(exit_code=exit_code)


def track_evaluation(
    result: EvaluationResult,
    *,
    output_dir: str | os.PathLike[str],
    mode: Mode = "offline",
    image: str | os.PathLike[str] | None = None,
    project: str = "ndp-gym",
    entity: str | None = None,
    name: str | None = None,
    settings: Settings | None = None,
) -> Path | None:
    """Log an evaluation: provenance as config, rows and at_quality as tables, summary, picture.

    Returns:
        Folder of the run, or ``None`` where ``mode`` is ``disabled``.
    """
    run_options: dict[str, Any] = {"project": project, "entity": entity, "name": name}
    with tracked_run(
        result.provenance,
        output_dir=output_dir,
        mode=mode,
        job_type="evaluate",
        settings=settings,
        **run_options,
    ) as run:
        for step, row in enumerate(result.rows):
            run.log({"global_step": step, "policy": row["policy"], **_metrics(row)})
        media = _media(result, image)
        if media and mode != "disabled":
            run.log(media)
        run.summary.update(_summary(result))
        return None if mode == "disabled" else Path(run.dir).parent


def log_agent(run: Run, weights: Path, scores: Mapping[str, Any]) -> None:
    """Log the agent whose ``weights`` have their card beside them, as an artifact with ``scores``.

    An offline run copies both files into its folder, for ``wandb sync``.

    Raises:
        ValueError: a file is missing.
    """
    import wandb

    artifact = wandb.Artifact("layer-agents", type="model", metadata=dict(scores))
    for file in (weights, weights.with_suffix(".json")):
        artifact.add_file(os.fspath(file), skip_cache=True)
    run.log_artifact(artifact)


def log_trace(run: Run, trace: RoutingTrace) -> None:
    """Log which recording a run used, as an artifact without files.

    Its metadata name the recording and prove which one it was: file name, size, sha256, model,
    source and licence. No recording is ever uploaded, the bundled one included: most are the work
    of others, and whoever has the file can compare its sha256.
    """
    import wandb

    stem = "memory" if trace.path is None else trace.path.stem
    metadata = {
        "name": trace.metadata.model if trace.path is None else trace.path.name,
        "sha256": trace.sha256,
        "size_bytes": None if trace.path is None else trace.path.stat().st_size,
        "n_rows": trace.n_rows,
        "model": trace.metadata.model,
        "source": trace.metadata.source,
        "licence": trace.metadata.licence,
    }
    name = f"trace-{re.sub('[^A-Za-z0-9_.-]', '-', stem)[:64]}-{trace.sha256[:12]}"
    run.log_artifact(wandb.Artifact(name, type="trace", metadata=metadata))


def _metrics(row: Row) -> dict[str, float]:
    """Numbers of one row under their ``perf/``, ``quality/`` and ``placement/`` keys."""
    values: Mapping[str, Any] = row
    return {
        f"{group}/{field}": float(values[field])
        for group, fields in _METRICS.items()
        for field in fields
        if values[field] is not None
    }


def _summary(result: EvaluationResult) -> dict[str, Any]:
    """Throughput, ΔNLL and reward per policy; the condition stands in the key where it varies."""
    groups = result.by_condition()
    summary: dict[str, Any] = {"n_rows": len(result.rows)}
    for condition, rows in groups.items():
        where = f"{condition}/" if len(groups) > 1 else ""
        for row in rows:
            values: Mapping[str, Any] = row
            for field in ("tokens_per_s", "delta_nll_nats", "reward"):
                summary[f"{where}{row['policy']}/{field}"] = values[field]
    return summary


def _media(result: EvaluationResult, image: str | os.PathLike[str] | None) -> dict[str, Any]:
    import wandb

    media: dict[str, Any] = {}
    for key, records in (("rows", result.rows), ("at_quality", result.at_quality)):
        if records:
            cells = [[_cell(v) for v in record.values()] for record in records]
            media[key] = wandb.Table(columns=list(records[0]), data=cells, allow_mixed_types=True)
    if image is not None:
        media["figure"] = wandb.Image(os.fspath(image))
    return media


def _cell(value: object) -> object:
    return str(value) if isinstance(value, list | tuple | dict) else value


@contextmanager
def _folders_under(output_dir: Path, mode: Mode) -> Iterator[None]:
    """Point wandb's folders under ``output_dir`` where the user has not set them, then restore."""
    unset = [] if mode == "disabled" else [key for key in _FOLDERS if not os.environ.get(key)]
    for key in unset:
        folder = output_dir.resolve() / _FOLDERS[key]
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[key] = str(folder)
    try:
        yield
    finally:
        for key in unset:
            os.environ.pop(key, None)
