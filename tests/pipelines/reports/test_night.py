"""A report has a line for each stage, without what did not happen."""

from typing import Any

from pipelines.reports import night

EMBED = {
    "catalogue_items": 1576, "former_items": 13, "item_rejects_rows": 18, "rejected_missing": 12,
    "rejected_not_an_image": 6, "rejects_waiting": 0,
}  # fmt: skip
SIMSCORE = {
    "impressions": 23490, "without_history": 35, "unknown_items": 0, "too_late_for_a_history": 0,
    "click_times_before_event": 0, "moved_impressions": 2,
}  # fmt: skip


COST = {"wall_seconds": 6.1, "cpu_seconds": 1234.5, "peak_memory_bytes": 1_250_000_000}


def report(idle: bool = False, **stages: tuple[dict[str, int], dict[str, float]]) -> dict[str, Any]:
    return {
        "ds": "2026-01-01",
        "run_id": "r",
        "idle": idle,
        "stages": {
            name.replace("_", "-"): {**COST, "counts": counts, "work": work, "why": []}
            for name, (counts, work) in stages.items()
        },
    }


def test_each_stage_has_a_line_that_leaves_out_zeros() -> None:
    work = {
        "images_unchanged": 1548, "images_reused": 0, "images_embedded": 10,
        "embedded_on_cpu_fp32": 10, "bytes_read": 2_500_000, "forward_seconds": 3.0,
    }  # fmt: skip
    histories = {"user_histories_rows": 1191, "recent_clicks_rows": 642}
    told = night.render_report(
        report(
            embed=(EMBED, work),
            item_features=({"items": 9, "items_with_cluster": 0, "items_out_of_scope": 0}, {}),
            histories=(histories, {}),
            simscore=(SIMSCORE, {"answered_bytes": 1_200_000}),
        )
    )
    assert told.splitlines() == [
        "ds 2026-01-01 published, run r",
        "  embed              6.1 s  1,234.5 s CPU   1.2 GB  1,576 items and 13 former ones: 1,548 "
        "as they were, 10 embedded on cpu fp32; 18 rejected: 12 missing, 6 not an image; read 2.5 "
        "MB",
        "  item-features      6.1 s  1,234.5 s CPU   1.2 GB  9 items",
        "  histories          6.1 s  1,234.5 s CPU   1.2 GB  1,191 users with a history",
        "  simscore           6.1 s  1,234.5 s CPU   1.2 GB  23,490 impressions: 23,455 with a "
        "history, 2 of items in another cluster than the day before; asked item shards for 1.2 MB",
    ]


def test_a_stage_that_this_run_did_not_make_has_no_cost() -> None:
    found = report(embed=(EMBED, {}), histories=({"user_histories_rows": 5}, {}))
    for name in COST:
        del found["stages"]["histories"][name]
    *_, line = night.render_report(found).splitlines()
    assert line == "  histories" + " " * 41 + "5 users with a history"


def test_a_run_that_made_nothing_anew_tells_no_work() -> None:
    told = night.render_report(report(embed=(EMBED, {})))
    assert "1,576 items and 13 former ones; 18 rejected" in told


def test_a_run_that_had_nothing_to_do_has_no_report() -> None:
    assert night.render_report(report(idle=True, embed=(EMBED, {}))) == ""


def test_a_training_set_tells_why_samples_lack_features() -> None:
    reasons = {"no_snapshot": 0, "unknown_item": 4, "no_image": 0, "out_of_scope": 0}
    counts = {"samples": 90, "matched": 70, **reasons, "no_history": 16}
    told = night.render_report(
        report(join=({**counts, "too_late_for_a_history": 7}, {"scores_taken": 50}))
    )
    assert told.splitlines()[1].endswith(
        "90 samples: 70 matched, 4 of items that the night lacks, 16 without a history, 50 with "
        "published scores; 7 in all too late for a history"
    )
