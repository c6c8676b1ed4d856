"""Gates stand between making and publishing: they stop what no night may put before a CTR model.

They judge by what was counted while the tables were made, which the manifests say; nothing is read
for them again. Some compare with what was published before: the newest day, or the median of the
last seven. Each has two limits in the settings: beyond `warn` it is told of, beyond `fail` nothing
is published, what was published before stays, and the operator may accept it for one run. Where
there is too little to judge, that is said.

Before a gate is looked at, the laws of DESIGN §3 that join tables are: one that does not hold is
our own fault or the disk's. The laws of rows were checked when they were written.
"""

import datetime as dt
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import isinf, sqrt
from typing import Any

import numpy as np

from feature_jobs import drift
from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    USER_HISTORIES,
    USER_SIMSCORES,
    DataContractError,
    GateRefused,
    Table,
)
from pipelines import stages
from pipelines.config import AtMost, Drift, Factor, Gates, Limits
from pipelines.stages import EMBED, HISTORIES, SIMSCORE, TRAINING_ROWS, Kind

OK, WARN, FAIL, ACCEPTED, UNJUDGED = "ok", "warn", "fail", "accepted", "unjudged"
NIGHTS = 7  # of which the median is taken
_LEAST_NIGHTS = 3
_LEAST_ROWS = 100
_LEAST_LOST = 3  # images or addresses, below which a small shop has lost none
_LEAST_CLUSTERS = 4
_UNEVEN = 2  # times its even share a cluster has of the items in every shop
_VERY_UNEVEN = 3  # times its even share, up to which a cluster is no reason to warn
_GROWING_DAYS = 7  # of a log's first days, in which histories grow from day to day
_INDEX = "the population stability index of"
_EARLIER_VERSION = "an earlier version of COURIER made this, which did not count it"

Manifest = Mapping[str, Any]


# ---- What is found -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Is what a gate finds of one `subject`; `observed` is None where there is too little to judge.

    `examples` are item IDs, never users; `cause` is what usually leads to it.
    """

    gate: str
    subject: str
    level: str
    observed: float | None
    limits: Limits
    text: str
    examples: tuple[int | str, ...] = ()
    detail: str = ""
    cause: str = ""

    @property
    def name(self) -> str:
        return f"{self.gate} ({self.subject})" if self.subject else self.gate

    def as_json(self) -> dict[str, Any]:
        """Returns it as a JSON document holds it: without limits that are infinite."""
        limits = {k: None if isinf(v) else v for k, v in self.limits.model_dump().items()}
        names = [one.name for one in fields(self) if one.name not in ("limits", "examples")]
        told = {name: getattr(self, name) for name in names}
        return {**told, **limits, "examples": list(self.examples)}

    def number(self, value: float | None) -> str:
        """Returns an observed value or a limit as people read it."""
        if value is None:
            return "-"
        if isinstance(self.limits, Drift):
            return f"{value:.3f}"
        if isinstance(self.limits, Factor):
            return f"{value:,.0f} x" if value >= 100 else f"{value:.3g} x"
        near = any(0 < abs(value - limit) < 0.001 for limit in (self.limits.warn, self.limits.fail))
        return f"{value:.3%}" if near else f"{value:.1%}"


@dataclass(frozen=True)
class Evidence:
    """Holds manifests by the names of their tables: what is known of a stage of one day.

    `made` are those of the stage and of what it was made from, `earlier` those of the days before
    that have the table published, newest first, at most seven. A day that `is_closed` may be empty.
    """

    made: Mapping[str, Manifest]
    earlier: Mapping[str, Sequence[Manifest]]
    is_closed: bool = False

    def counts(self, table: Table) -> Mapping[str, int]:
        return counts_of(self.made[table.name])

    def before(self, table: Table) -> Manifest | None:
        """Returns the manifest of the newest day before on which the table is published."""
        return next(iter(self.earlier.get(table.name, ())), None)


def counts_of(manifest: Manifest) -> dict[str, int]:
    """Returns what was counted of a table, and its rows as `<table>_rows`."""
    return {f"{manifest['table']}_rows": manifest["rows"], **manifest["counts"]}


@dataclass(frozen=True)
class _Seen:
    """Is what a gate sees; `value` is None where `text` says why that cannot be judged.

    Up to `usual` it is what small shops see when all is well, or chance: no reason to warn; nor is
    it one to refuse up to `floor`.
    """

    gate: str
    subject: str
    value: float | None
    text: str
    examples: Sequence[int | str] = ()
    detail: str = ""
    usual: float = 0.0
    floor: float = 0.0


# ---- Judging -----------------------------------------------------------------------------------


def judge(kind: Kind, evidence: Evidence, limits: Gates) -> list[Finding]:
    """Returns what all gates of a stage find."""
    seen = _SEEN[kind](evidence, limits) if kind in _SEEN else ()
    return [_finding(one, getattr(limits, one.gate)) for one in seen]


def _finding(seen: _Seen, limits: Limits) -> Finding:
    fail = max(seen.floor, limits.fail)
    if seen.usual > limits.warn or fail > limits.fail:
        warn = min(max(seen.usual, limits.warn), fail)
        limits = limits.model_copy(update={"warn": warn, "fail": fail})
    level, examples = _level(seen.value, limits), tuple(seen.examples)
    text, cause = seen.text, CAUSES[seen.gate]
    return Finding(
        seen.gate, seen.subject, level, seen.value, limits, text, examples, seen.detail, cause
    )


def _level(value: float | None, limits: Limits) -> str:
    if value is None:
        return UNJUDGED
    if limits.is_beyond(value, limits.fail):
        return FAIL
    return WARN if limits.is_beyond(value, limits.warn) else OK


def _embed(evidence: Evidence, _: Gates) -> Iterator[_Seen]:
    counts, rejects = evidence.counts(ITEM_EMBEDDINGS), evidence.made[ITEM_REJECTS.name]["rows"]
    examples = evidence.made[ITEM_EMBEDDINGS.name].get("examples", {})
    items, without = counts["catalogue_items"], counts.get("items_without_uri")
    rejected, are_taken = examples.get("rejected", ()), "vectors_read" in counts
    yield _share("image_coverage", items - rejects, items, "catalogue items have an embedding")
    yield _lost_addresses(counts, evidence.before(ITEM_EMBEDDINGS))
    what = "have no usable vector" if are_taken else "with an address have no readable image"
    unread = f"catalogue items {what} ({reasons(counts)})"
    named = None if without is None else items - without
    unreadable = None if without is None else rejects - without
    found = _share("rejects", unreadable, named, unread, rejected)
    yield replace(found, usual=(_LEAST_LOST - 1) / named if named else 0.0)
    yield _outage(evidence, counts, examples.get("not_fetched", ()))
    earlier = [m["counts"]["catalogue_items"] for m in evidence.earlier[ITEM_EMBEDDINGS.name]]
    yield _factor("item_rows", items, earlier, "catalogue items", evidence.is_closed and not items)
    if evidence.is_closed and not items:
        yield _Seen("item_rows", "that stay", None, "the day is one of closed_days")
    else:
        yield _left(evidence.made[ITEM_EMBEDDINGS.name], evidence.before(ITEM_EMBEDDINGS))


def _lost_addresses(now: Mapping[str, int], before: Manifest | None) -> _Seen:
    """Sees by how much more of the catalogue has no image address than the day before."""
    then = before["counts"] if before else {}
    if not now["catalogue_items"] or not then.get("catalogue_items"):
        return _Seen("lost_addresses", "", None, "no catalogue of a day before to compare with")
    if "items_without_uri" not in now or "items_without_uri" not in then:
        return _Seen("lost_addresses", "", None, _EARLIER_VERSION)
    was, is_now = (c["items_without_uri"] / c["catalogue_items"] for c in (then, now))
    text = f"{is_now:.1%} of catalogue items have no image address, {was:.1%} the day before"
    few = (_LEAST_LOST - 1) / now["catalogue_items"]
    return _Seen("lost_addresses", "", max(0.0, is_now - was), text, usual=few, floor=few)


def _left(now: Manifest, before: Manifest | None) -> _Seen:
    """Sees how many items left the catalogue, as another shop's has as many rows.

    They are at least as many as there are more former items: of these some are forgotten each day.
    """
    gate, subject = "item_rows", "that stay"
    if before is None:
        return _Seen(gate, subject, None, "no day before is published to compare with")
    items, former = before["counts"]["catalogue_items"], before["counts"]["former_items"]
    left = min(items, max(0, now["counts"]["former_items"] - former))
    text = f"{left:,} of {items:,} catalogue items of the day before have left"
    if items < _LEAST_ROWS:
        return _Seen(gate, subject, None, f"{text}: too few to judge")
    days = (dt.date.fromisoformat(now["ds"]) - dt.date.fromisoformat(before["ds"])).days
    if days > NIGHTS:
        return _Seen(gate, subject, None, f"{text}: that was {days} days before")
    return _Seen(gate, subject, _times(items, items - left), text)


def _outage(evidence: Evidence, counts: Mapping[str, int], examples: Sequence[int | str]) -> _Seen:
    if evidence.before(ITEM_EMBEDDINGS) is None:
        return _Seen("outage", "", None, "no day before is published: the gate rejects judges all")
    lost = counts.get("items_not_fetched")
    least = 0 if lost is None or lost >= _LEAST_LOST else _LEAST_ROWS
    things = "vectors" if "vectors_read" in counts else "images"
    what = f"{things} that were there last time, or are new, could not be fetched"
    return _share("outage", lost, counts.get("items_tried"), what, examples, least)


def reasons(counts: Mapping[str, int]) -> str:
    """Returns for which reasons images were rejected, the most frequent first."""
    found = {k.removeprefix("rejected_"): v for k, v in counts.items() if k.startswith("rejected_")}
    if found.get("unsupported_uri"):  # as is none at all, which `image_coverage` is about
        found["unsupported_uri"] -= counts.get("items_without_uri", 0)
    told = [f"{reason} {n:,}" for reason, n in sorted(found.items(), key=lambda x: -x[1]) if n]
    return ", ".join(told) or "none"


def _item_features(evidence: Evidence, limits: Gates) -> Iterator[_Seen]:
    made, before = evidence.made[ITEM_FEATURES.name], evidence.before(ITEM_FEATURES)
    is_new = before is not None and before["identities"] != made["identities"]
    for label, found in made.get("clusters", {}).items():
        yield from _clusters(label, found, limits, is_new)


def _clusters(label: str, found: Mapping[str, Any], limits: Gates, is_new: bool) -> Iterator[_Seen]:
    """Sees churn, imbalance and drift among the clusters of one resolution."""
    left = [f"{c['cluster_id']} ({c['moved']:,} of {c['of']:,})" for c in found["most_moved"]]
    what = f"items have another cluster ID ({label}) than the day before"
    examples, moved = (
        found.get("moved_examples", ()),
        (found["moved_items"], found["compared_items"]),
    )
    churn = _share("churn", *moved, what, examples, subject=f"items, {label}")
    detail = f"clusters that most items left: {', '.join(left)}" if left else ""
    yield replace(churn, detail=detail)
    yield _numbered(label, found)
    if not found["items"]:
        return
    yield _balance(label, found)
    dead = f"clusters ({label}) have no item"
    yield _share("dead_clusters", found["dead"], found["clusters"], dead, subject=label)
    if is_new:
        why = "the day before has another encoder or codebook: the gate churn judges that"
        yield _Seen("cluster_drift", label, None, why)
    else:
        yield _cluster_drift(label, found, limits.cluster_drift)


def _numbered(label: str, found: Mapping[str, Any]) -> _Seen:
    """Sees whether about as many items have a cluster ID as the day before."""
    now, before = found["items"], found.get("items_before")
    if before is None:
        return _Seen("item_rows", label, None, _EARLIER_VERSION)
    text = f"{now:,} items have a cluster ID ({label}), {before:,} had one the day before"
    if before < _LEAST_ROWS:
        return _Seen("item_rows", label, None, f"{text}: too few to judge")
    return _Seen("item_rows", label, _times(now, before), text)


def _balance(label: str, found: Mapping[str, Any]) -> _Seen:
    what = f"items with a cluster ID ({label}) are in cluster {found['largest_cluster']}"
    largest = _share("balance", found["items_max"], found["items"], what, subject=label)
    if (clusters := found["clusters"]) >= _LEAST_CLUSTERS:
        return replace(largest, usual=_VERY_UNEVEN / clusters, floor=_UNEVEN / clusters)
    why = f"{largest.text}: of {found['clusters']:,} clusters some are as large when all is well"
    return replace(largest, value=None, text=why)


def _cluster_drift(label: str, found: Mapping[str, Any], limits: Drift) -> _Seen:
    if "items_before" not in found:
        return _Seen("cluster_drift", label, None, _EARLIER_VERSION)
    index, n, before = found["population_stability_index"], found["items"], found["items_before"]
    if index is None:
        why = "there are no cluster numbers of the day before to compare with"
        return _Seen("cluster_drift", label, None, why)
    if not before:
        return _Seen("cluster_drift", label, None, "no item had a cluster ID the day before")
    # Items that stay and keep their number move nothing: chance is at work among the others.
    others = 1 - (found["compared_items"] - found["moved_items"]) / max(n, before)
    chance = others * drift.expected_noise(found["clusters"], n, before)
    if chance > limits.fail:
        why = f"{n:,} items are too few for {found['clusters']:,} clusters"
        return _Seen("cluster_drift", label, None, why)
    text = f"{_INDEX} sizes of clusters ({label}) of {n:,} items, before of {before:,}"
    return _Seen("cluster_drift", label, index, text, usual=chance)


def _histories(evidence: Evidence, _: Gates) -> Iterator[_Seen]:
    rows = evidence.made[USER_HISTORIES.name]["rows"]
    earlier = [m["rows"] for m in evidence.earlier[USER_HISTORIES.name]]
    median = _median(earlier)
    if median is None:
        yield _Seen("user_rows", "", None, _too_few(earlier, "users with a history"))
        return
    text = f"{rows:,} users with a history, {median:,.0f} in the median of the last nights"
    yield _Seen("user_rows", "", rows / median, text)


def _simscore(evidence: Evidence, limits: Gates) -> Iterator[_Seen]:
    counts, examples = evidence.counts(USER_SIMSCORES), evidence.made[USER_SIMSCORES.name].get(
        "examples", {}
    )  # fmt: skip
    n = counts["impressions"]
    unknown = examples.get("unknown_items", ())
    what = "impressions are of items that the catalogue lacks"
    with_items = n - counts.get("without_snapshot", 0)  # of the others nothing can be known
    yield _share("unknown_items", counts["unknown_items"], with_items, what, unknown)
    what = "impressions are of items whose cluster ID is not that of the day before"
    moved = counts["moved_impressions"], counts["compared_impressions"]
    yield _share("churn", *moved, what, subject="impressions")
    what = "impressions lie before their day"
    yield _share("late", counts.get("late_impressions"), n, what, least=_LEAST_ROWS)
    what = "impressions came too late for a history"
    yield _share("too_late", counts.get("too_late_for_a_history", 0), n, what, least=_LEAST_ROWS)
    if "clicks_with_time" in counts:
        what = "clicks have a click time"
        timed = counts["clicks_with_time"], counts["clicks"]
        yield _share("click_times", *timed, what, least=_LEAST_ROWS)
    what = "impressions with a history have a known score"
    with_both = n - counts["without_history"] - counts.get("histories_without_snapshot", 0)
    scored = counts.get("scored_impressions"), with_both
    yield _share("score_coverage", *scored, what, least=_LEAST_ROWS)
    yield from _score_drifts(evidence, limits)
    yield from _traffic(
        counts, [m["counts"] for m in evidence.earlier[USER_SIMSCORES.name]], evidence.is_closed
    )


def _traffic(
    counts: Mapping[str, int], earlier: Sequence[Mapping[str, int]], is_closed: bool
) -> Iterator[_Seen]:
    """Sees whether there are about as many impressions and users as usual, and clicks for them."""
    gate, n = "impression_rows", counts["impressions"]
    found = [night["impressions"] for night in earlier]
    yield _factor(gate, n, found, "impressions", is_closed)
    users = [night.get("users", 0) for night in earlier]
    yield _factor(gate, counts.get("users"), users, "users", is_closed, "users")
    clicks = [night["clicks"] * n / max(1, night["impressions"]) for night in earlier]
    what = f"clicks of {n:,} impressions"
    yield _factor(gate, counts["clicks"], clicks, what, is_closed, "clicks")


def _score_drifts(evidence: Evidence, limits: Gates) -> Iterator[_Seen]:
    """Sees how far scores and histories are from those of the day before."""
    now, earlier = evidence.made[USER_SIMSCORES.name], evidence.earlier[USER_SIMSCORES.name]
    before = next((night for night in earlier if night["rows"]), None)  # empty days tell nothing
    compared = [
        ("score_drift", "clicked", "sim_max_clicked", "largest scores of clicked impressions"),
        ("score_drift", "unclicked", "sim_max_unclicked", "largest scores of others"),
        ("history_drift", "", "history_len", "lengths of histories"),
    ]
    why = _why_not_compared(evidence, before)
    for gate, subject, name, what in compared:
        if why or before is None:
            yield _Seen(gate, subject, None, why)
            continue
        yield _drift(gate, subject, name, what, now, before, getattr(limits, gate))
    if why or before is None:
        yield _Seen("zero_rows", "", None, why)
        return
    yield _zero_rows(now["counts"], before["counts"], limits.zero_rows)


def _why_not_compared(evidence: Evidence, before: Manifest | None) -> str:
    """Returns why scores cannot be compared with those of the day before; "" where they can."""
    if before is None:
        return "no day before is published to compare with"
    if "histograms" not in before or "histograms" not in evidence.made[USER_SIMSCORES.name]:
        return _EARLIER_VERSION
    histories = evidence.before(USER_HISTORIES)
    if histories is None or before["notes"].get("logged_histories"):
        return ""
    known, window = len(histories["inputs"]["log_rows"]), histories["settings"]["window_days"]
    if known < min(_GROWING_DAYS, window):
        return f"histories of the day before know {known} days, and grow from day to day"
    return ""


def _drift(
    gate: str, subject: str, name: str, what: str, now: Manifest, before: Manifest, limits: Drift
) -> _Seen:
    """Sees how far a distribution is from that of the day before, by deciles of that.

    The impressions of a user are alike: how much chance does is judged by the number of users.
    """
    counts = [np.array(m["histograms"].get(name, []), np.int64) for m in (before, now)]
    length = max(map(len, counts))
    counts = [np.pad(c, (0, length - len(c))) for c in counts]
    some = "clicks" if subject == "clicked" else "impressions"
    users = [
        min(_users(m["counts"], some), c.sum()) for m, c in zip((before, now), counts, strict=True)
    ]
    if min(users) < 1:
        return _Seen(gate, subject, None, f"no {what} to compare")
    bins = drift.deciles(*counts)
    if len(bins[0]) < 2:
        return _Seen(gate, subject, None, f"{what} are all alike")
    chance = drift.expected_noise(len(bins[0]), *users)
    if chance > limits.fail:
        few = f"{what}: {min(users):,.0f} users of equal weight are too few to judge by"
        return _Seen(gate, subject, None, few)
    text = f"{_INDEX} {what}, against the day before"
    middle, was = (_median_bin(c, name) for c in reversed(counts))
    index, detail = drift.population_stability_index(*bins), f"the median is {middle}, was {was}"
    return _Seen(gate, subject, index, text, detail=detail, usual=chance)


def _users(counts: Mapping[str, int], some: str) -> float:
    """Returns of how many users `some` are, as if each had as many: few may have most of them."""
    squared = counts.get(f"{some}_by_user_squared", 0)
    return counts[some] ** 2 / squared if squared else 0.0


def _median_bin(counts: np.ndarray, name: str) -> str:
    """Returns the median of a histogram as people read it: a length, or a score."""
    place = int(np.searchsorted(counts.cumsum(), counts.sum() / 2))
    return f"{place}" if name == "history_len" else f"{(place + 0.5) * 2 / len(counts) - 1:.2f}"


def _zero_rows(now: Mapping[str, int], before: Mapping[str, int], limits: AtMost) -> _Seen:
    """Sees by how much more of the impressions have no known score than the day before."""
    shares, noise = [], 0.0
    for counts in (before, now):
        n, users = counts["impressions"], _users(counts, "impressions")
        if users < _LEAST_ROWS:
            return _Seen("zero_rows", "", None, "too few users to judge by")
        share = 1 - counts["scored_impressions"] / n
        shares.append(share)
        noise += share * (1 - share) / users
    chance = 4 * sqrt(noise)
    if chance > limits.fail:
        return _Seen("zero_rows", "", None, "too few users to judge by")
    text = f"{shares[1]:.1%} of impressions have no known score, {shares[0]:.1%} the day before"
    return _Seen("zero_rows", "", max(0.0, shares[1] - shares[0]), text, usual=chance)


def _share(
    gate: str, some: int | None, total: int | None, what: str, examples: Sequence[int | str] = (),
    least: int = 1, subject: str = "",
) -> _Seen:  # fmt: skip
    if some is None or total is None:
        return _Seen(gate, subject, None, _EARLIER_VERSION)
    text = f"{some:,} of {total:,} {what}"
    if total < least:
        return _Seen(gate, subject, None, f"{text}: too few to judge")
    return _Seen(gate, subject, some / total if total else None, text, examples if some else ())


def _factor(
    gate: str, rows: int | None, earlier: Sequence[float], what: str, is_closed: bool,
    subject: str = "",
) -> _Seen:  # fmt: skip
    if rows is None:
        return _Seen(gate, subject, None, _EARLIER_VERSION)
    median = _median(earlier)
    if median is None:
        return _Seen(gate, subject, None, _too_few(earlier, what))
    text = f"{rows:,} {what}, {median:,.0f} in the median of the last nights"
    if is_closed:
        return _Seen(gate, subject, None, f"{text}: the day is one of closed_days")
    return _Seen(gate, subject, _times(rows, median), text)


def _times(one: float, other: float) -> float:
    """Returns how many times the smaller number goes into the larger one."""
    return max(one, other) / max(1, min(one, other))


def _median(earlier: Sequence[float]) -> float | None:
    """Returns the median of the last nights that are not empty; None where it tells nothing."""
    found = [rows for rows in earlier if rows]
    median = statistics.median(found) if len(found) >= _LEAST_NIGHTS else 0
    return median if median >= _LEAST_ROWS else None


def _too_few(earlier: Sequence[float], what: str) -> str:
    return f"earlier nights that are published, {len(earlier)}, have too few {what} to compare with"


_SEEN = {
    EMBED: _embed,
    stages.ITEM_FEATURES: _item_features,
    HISTORIES: _histories,
    SIMSCORE: _simscore,
}


# ---- Why, and what to do -----------------------------------------------------------------------

_AGAIN = "mend the input and run the command again"
_ACCEPT_NEW = (
    "if it is on purpose, move the CTR model's rows with `courier crosswalk` and accept it once"
)
# Of each gate: what usually causes it, and what to do.
CAUSES: dict[str, str] = {
    "image_coverage": "an export without its image addresses; " + _AGAIN,
    "lost_addresses": "an export to which the image addresses are not joined yet; " + _AGAIN,
    "rejects": "an export of images or vectors that is late or incomplete, or files that are no "
    "pictures; look at the reasons, mend them and run the command again",
    "outage": "a mount or a bucket that is gone, an export of images or vectors that is late, "
    "permissions; mend that and run the command again: nothing was noted against these items",
    "item_rows": "a catalogue that is cut short, doubled, or another shop's, or whose IDs or "
    "categories are written anew; " + _AGAIN,
    "churn": "a new codebook, whose numbers stand for other items: " + _ACCEPT_NEW + "; without a "
    "new pin: images that all changed",
    "balance": "an encoder that takes most images for the same one; do not pin it",
    "dead_clusters": "a codebook of another catalogue, or much too old: fit a new one by `courier "
    "fit-codebook`",
    "cluster_drift": "many new items of one kind, a catalogue that lost a part, or images that all "
    "changed; " + _AGAIN,
    "user_rows": "logs that lost users, or histories that began anew; " + _AGAIN,
    "unknown_items": "a catalogue of another day or shop; " + _AGAIN,
    "late": "a log that is split by another date than event_time's, or came late; " + _AGAIN,
    "too_late": "an old log that was replayed; late_days in the settings says how late is known",
    "click_times": "a log whose click times are not joined yet; " + _AGAIN,
    "score_coverage": "items of the log and of the catalogue whose IDs do not meet, or an encoder "
    "for few categories; lower the limits in that case",
    "score_drift": "a new encoder (accept it once, with churn), or images that all changed",
    "history_drift": "a log that lost or doubled clicks, or histories that began anew; " + _AGAIN,
    "zero_rows": "embeddings or histories that are missing for a part of the log; " + _AGAIN,
    "impression_rows": "a log that is cut short or doubled, or to which clicks or users are not "
    "joined yet; " + _AGAIN + ", or name the day in closed_days if the shop was closed",
}


def refusal(
    ds: Any, kind: Kind, findings: Sequence[Finding], accepted: Sequence[str] = ()
) -> GateRefused:
    """Returns the error that tells which gates refuse a stage of ds, and their table.

    Those that this run `accepted`, of whatever stage, are judged again by the next one.
    """
    failed = [finding for finding in findings if finding.level == FAIL]
    told = "; ".join(
        f"{one.text} ({one.number(one.observed)}, {_side(one)} the limit of "
        f"{one.number(one.limits.fail)} of the gate {one.gate}"
        f"{'; ' * bool(one.detail)}{one.detail})"
        for one in failed
    )
    names = dict.fromkeys([*accepted, *(one.gate for one in failed)])
    accept = " ".join(f"--accept {name}" for name in names)
    return GateRefused(
        f"ds {ds}: {told}. Nothing of {kind.name} was published, and what was published before "
        "stands. Mend what led there and run the command again; or publish this run all the same "
        f"by adding `{accept} --reason '…'` to it, which the night's record will tell; or change "
        "the limits under [gates] in the settings.",
        f"{table(failed)}\n"
        "next: the same command again, once that is mended; if it is right as it is, the same "
        f"command with {accept} --reason '…'",
    )


def _side(finding: Finding) -> str:
    return "above" if finding.limits.upwards else "below"


def table(findings: Sequence[Finding]) -> str:
    """Returns findings as a table: gate, observed, limit, examples; below each its usual cause."""
    heads = ("gate", "observed", "limit", "for example")
    rows = [
        (
            one.name, one.number(one.observed), one.number(one.limits.fail),
            ", ".join(map(str, one.examples)) or "-",
        )
        for one in findings
    ]  # fmt: skip
    widths = [max(len(row[at]) for row in (heads, *rows)) for at in range(3)]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        return "  ".join([first, *(row[at].rjust(widths[at]) for at in (1, 2)), row[3]])

    lines = [line(heads)]
    for one, row in zip(findings, rows, strict=True):
        lines += [line(row), f"  usually: {one.cause}"]
    return "\n".join(lines)


def short(finding: Finding) -> str:
    """Returns what is told of a finding that lets a night pass, in one line."""
    observed, limits = finding.number(finding.observed), finding.limits
    if finding.level == ACCEPTED:
        return f"the gate {finding.gate} was accepted: {finding.text} ({observed})"
    limit = f"{_side(finding)} {finding.number(limits.warn)}"
    return (
        f"the gate {finding.gate} warns: {finding.text} ({observed}, {limit}; it refuses at "
        f"{finding.number(limits.fail)})"
    )


def mixed(work: Mapping[str, float]) -> list[str]:
    """Returns a warning where the new embeddings are of several precisions.

    `work` is what the stage's workers tell of it.
    """
    made = {name: int(n) for name, n in work.items() if name.startswith("embedded_on_")}
    if len({name.rpartition("_")[2] for name in made}) < 2:
        return []
    found = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in made.items())
    return [
        f"The new embeddings are of several precisions ({found}): fp32 and bf16 of one image have "
        "a cosine of 0.9999 or so, not 1. Give all workers one kind of machine, or say "
        '[embed] precision = "fp32" or "bf16" in the settings, which embeds all images anew.'
    ]


# ---- Laws --------------------------------------------------------------------------------------


def check_laws(kind: Kind, input_rows: int, counts: Mapping[Kind, Mapping[str, int]]) -> None:
    """Raises DataContractError where what a stage made has not as many rows as it was made from.

    `input_rows` are those of the stage's input, `counts` its own and those of the stages upstream.
    """
    for what, found, expected in _laws(kind, input_rows, counts):
        if found != expected:
            raise DataContractError(
                f"{what}: found {found:,}, expected {expected:,}. Rows were lost or doubled; "
                "nothing was published. This is a fault of COURIER or of the disk; run the command "
                "again, and report it if it stays."
            )


def _laws(
    kind: Kind, input_rows: int, counts: Mapping[Kind, Mapping[str, int]]
) -> Iterator[tuple[str, int, int]]:
    """Yields what must be equal of a stage: what it is, how many there are, how many there must be.

    Nothing that is counted says how many users have a history.
    """
    mine = counts[kind]
    if kind is EMBED:
        catalogue = mine["catalogue_items"]
        embedded = mine["item_embeddings_rows"] - mine["former_items"]
        yield "catalogue rows that reached EMBED", catalogue, input_rows
        sides = embedded + mine["item_rejects_rows"]
        yield "item_embeddings in the catalogue + item_rejects", sides, catalogue
    elif kind is stages.ITEM_FEATURES:
        items = counts[EMBED]["item_embeddings_rows"] + counts[EMBED]["item_rejects_rows"]
        yield "item_features rows", mine["item_features_rows"], items
    elif kind is SIMSCORE:
        yield "user_simscores rows", mine["user_simscores_rows"], input_rows
    elif kind is TRAINING_ROWS:
        reached = mine["impressions"] + mine["out_of_scope_impressions"]
        yield "impressions that reached TRAINING-ROWS", reached, input_rows
    elif kind.name == stages.JOIN.name:
        yield "rows of the training set", mine[f"{kind.tables[0].name}_rows"], input_rows
