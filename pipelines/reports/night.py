"""Tells people what a night would do, and what it did: a line for each stage."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines import stages
from pipelines.planning.impressions import PlannedScores
from pipelines.running import beam_options, records
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import (
    BEGUN,
    NEVER_MADE,
    PUBLISHED,
    REFUSED,
    STAGED,
    Look,
    Night,
    State,
)

Numbers = Mapping[str, float]

# ---- What it would do --------------------------------------------------------------------------


def describe_plan(night: Night, beam_args: Sequence[str]) -> dict[str, Any]:
    """Returns what `make_nights` would do, stage by stage; checks the Beam options too."""
    beam_options.check_ready(
        beam_options.job_options(night.settings, stage.name, beam_args) for stage in night.stages
    )
    held = records.read_hold(night.settings.layout, night.ds)
    return {
        "ds": str(night.ds),
        "run_id": night.run_id,
        "held": held and {"since": held["since"], "reason": held["reason"]},
        "stages": [_describe(one, night.look) for one in night.planned],
    }


def _describe(one: Planned, look: Look) -> dict[str, Any]:
    state = look.state(one.stage)
    by = {"embeddings_by": one.embeddings_by} if isinstance(one, PlannedScores) else {}
    action = _action(one.stage, state)
    told = {"state": state.name, "why": list(state.why), "action": action}
    return {**one.stage.as_json(), **by, **told}


def _action(stage: Stage, state: State) -> str:
    if state.name == PUBLISHED:
        return "compute" if stage.forced else "leave alone: published from the same inputs"
    if state.name in (STAGED, REFUSED):
        return "publish, if the gates let it pass: made by an earlier run"
    if state.name == BEGUN:
        return f"resume: {state.shards_done} of {stage.shards} shards are made"
    return "compute"


def render_plan(plan: dict[str, Any]) -> str:
    held = plan["held"]
    hold = f", on hold: rolled back at {held['since']} ({held['reason']})" if held else ""
    lines = [f"ds {plan['ds']}{hold}"]
    for stage in plan["stages"]:
        rows = f", {stage['input_rows']:,} input rows" if stage["input_rows"] else ""
        rows += f", embeddings by {stage['embeddings_by']}" if "embeddings_by" in stage else ""
        why = f": {'; '.join(stage['why'])}" if stage["why"] else ""
        lines.append(
            f"  {stage['stage']:14} {stage['action']}{why} (run {stage['run_id']}, "
            f"{stage['shards']} shards{rows})"
        )
        lines += [f"  {'':14} -> {table}" for table in stage["tables"]]
    return "\n".join(lines)


# ---- What it did -------------------------------------------------------------------------------


def render_report(report: dict[str, Any]) -> str:
    """Returns what a run did, a line for each stage; empty where it had nothing to do."""
    if report["idle"]:
        return ""
    lines = [f"ds {report['ds']} published, run {report['run_id']}"]
    for name, stage in report["stages"].items():
        counts = Counter(stage["counts"])  # what was not counted is 0
        told = _TOLD.get(name, _rows)(counts, stage["work"])
        why = [reason for reason in stage["why"] if reason != NEVER_MADE]
        told += f" ({'; '.join(why)})" if why else ""
        lines.append(f"  {name:14}{_cost(stage)}  {told}")
    return "\n".join(lines)


def _cost(stage: Mapping[str, Any]) -> str:
    """Returns what making a stage took, blanks where this run did not make it."""
    if "wall_seconds" not in stage:
        return " " * 34
    wall, cpu = stage["wall_seconds"], stage["cpu_seconds"]
    return f"{wall:8,.1f} s {cpu:8,.1f} s CPU {stage['peak_memory_bytes'] / 1e9:5.1f} GB"


def _embed(counts: Numbers, work: Numbers) -> str:
    places = [
        f"{n:,} embedded on {name.removeprefix('embedded_on_').replace('_', ' ')}"
        for name, n in work.items()
        if name.startswith("embedded_on_")
    ]
    done = _nonzero(
        (work.get("images_unchanged", 0), "as they were"),
        (work.get("images_reused", 0), "reused by bytes"),
        (work.get("vectors_taken", 0), "vectors taken"),
    )
    rejected = {k.removeprefix("rejected_"): n for k, n in counts.items() if "rejected_" in k}
    reasons = _nonzero(*((n, reason.replace("_", " ")) for reason, n in rejected.items()))
    items = f"{counts['catalogue_items']:,} items"
    if counts["former_items"]:
        items += f" and {counts['former_items']:,} former ones"
    told = [_of(items, [*done, *places])]
    if reasons:
        told.append(f"{counts['item_rejects_rows']:,} rejected: {', '.join(reasons)}")
    if ignored := counts.get("vectors_ignored"):
        told.append(f"{ignored:,} vectors of other items left")
    if read := work.get("bytes_read"):
        told.append(f"read {_size(read)}")
    return "; ".join(told)


def _item_features(counts: Numbers, _: Numbers) -> str:
    found = _nonzero(
        (counts["items_with_cluster"], "with a cluster ID"),
        (counts["items_out_of_scope"], "out of scope"),
    )
    return _of(f"{counts['items']:,} items", found)


def _histories(counts: Numbers, _: Numbers) -> str:
    return f"{counts['user_histories_rows']:,} users with a history"


def _simscore(counts: Numbers, work: Numbers) -> str:
    rows = counts["impressions"]
    found = _nonzero(
        (rows - counts["without_history"], "with a history"),
        (counts["without_snapshot"], "before any night"),
        (counts["unknown_items"], "of items that the catalogue lacks"),
        (counts["too_late_for_a_history"], "too late for a history"),
        (counts["click_times_before_event"], "clicked before they were shown"),
        (counts["moved_impressions"], "of items in another cluster than the day before"),
    )
    answered = work.get("answered_bytes")
    return _of(f"{rows:,} impressions", found) + (
        f"; asked item shards for {_size(answered)}" if answered else ""
    )


def _training_rows(counts: Numbers, _: Numbers) -> str:
    found = _nonzero(
        (counts["rows_with_history"], "with a history"),
        (counts["requests"], "requests"),
        (counts["out_of_scope_impressions"], "impressions out of scope"),
        (counts["unclicked_left_out"], "impressions without a click left out"),
    )
    return _of(f"{counts['training_rows_rows']:,} rows", found)


def _join(counts: Numbers, work: Numbers) -> str:
    found = _nonzero(
        (counts["matched"], "matched"),
        (counts["no_snapshot"], "before any night"),
        (counts["unknown_item"], "of items that the night lacks"),
        (counts["no_image"], "of items without an embedding"),
        (counts["out_of_scope"], "out of scope"),
        (counts["no_history"], "without a history"),
        (work.get("scores_taken", 0), "with published scores"),
    )
    told = _of(f"{counts['samples']:,} samples", found)
    if late := counts.get("too_late_for_a_history"):
        told += f"; {late:,} in all too late for a history"
    if "positives" in counts and counts["samples"]:
        told += f"; label rate {counts['positives'] / counts['samples']:.3%}, as in the samples"
    return told


_TOLD: dict[str, Callable[[Numbers, Numbers], str]] = {
    stages.EMBED.name: _embed,
    stages.ITEM_FEATURES.name: _item_features,
    stages.HISTORIES.name: _histories,
    stages.SIMSCORE.name: _simscore,
    stages.TRAINING_ROWS.name: _training_rows,
    stages.JOIN.name: _join,
}


def _rows(counts: Numbers, _: Numbers) -> str:
    """Returns what is said of a stage that has no words of its own: the rows of its tables."""
    rows = {name: n for name, n in counts.items() if name.endswith("_rows")}
    return ", ".join(f"{n:,} rows of {name.removesuffix('_rows')}" for name, n in rows.items())


def _nonzero(*found: tuple[float, str]) -> list[str]:
    return [f"{n:,} {what}" for n, what in found if n]


def _size(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _of(all_of_them: str, some: Sequence[str]) -> str:
    return f"{all_of_them}: {', '.join(some)}" if some else all_of_them
