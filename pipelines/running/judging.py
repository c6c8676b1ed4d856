"""Gathers what the gates judge by, of what is staged or published, and says what they refuse."""

import bisect
import datetime as dt
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from pyarrow import ArrowInvalid

from feature_jobs.schemas import (
    ITEM_EMBEDDINGS,
    ITEM_FEATURES,
    ITEM_REJECTS,
    USER_HISTORIES,
    CourierError,
    DataContractError,
    GateRefused,
    InputNotReady,
    Table,
)
from feature_jobs.store.partitions import Partition
from pipelines.config import Settings
from pipelines.running import gates, making, states
from pipelines.running.gates import ACCEPTED, FAIL, WARN, Evidence, Finding, Manifest
from pipelines.running.layout import Layout
from pipelines.running.stage import Planned, Stage
from pipelines.running.states import PUBLISHED, Look, Night
from pipelines.stages import EMBED, KINDS, SIMSCORE, Kind

if TYPE_CHECKING:  # it needs Beam, for which no gate is to wait
    from feature_jobs.items.item_features import SamePicture

Made = Mapping[str, Partition]  # by the names of their tables


@dataclass(frozen=True)
class Accepted:
    """Names the gates that an operator accepts for one run, and says why."""

    gates: tuple[str, ...] = ()
    reason: str = ""


# ---- Before publishing -------------------------------------------------------------------------


class Judge:
    """Judges the stages of nights that are made together, and keeps what the gates found.

    `findings` are those of each stage, by its run_id.
    """

    def __init__(self, accepted: Accepted):
        self._accepted = accepted
        self.findings: dict[str, list[Finding]] = {}

    def refused(
        self, kind: Kind, nights: Sequence[Night], without: Collection[dt.date]
    ) -> list[tuple[Planned, CourierError]]:
        """Judges the stages of a kind that are made and not published; returns what is refused.

        Of the others, the manifests say from then on what is beyond a limit. The days `without` are
        not published: nothing is compared with what was made for them.
        """
        look, refused = Look(), list[tuple[Planned, CourierError]]()
        asked = [night for night in nights if night.ds not in without]
        earlier = Nights(nights[0].settings.layout, look, asked)
        for night in asked:
            for one in (one for one in night.planned if one.stage.kind is kind):
                state = look.state(one.stage)
                if state.name == PUBLISHED or not state.is_made:
                    continue
                try:
                    self._judge(one.stage, night.settings, earlier)
                    states.note_refusal(one.stage, None)
                except (GateRefused, DataContractError) as error:
                    refused.append((one, error))
                    earlier.leave_out(night.ds)
        return refused

    def _judge(self, stage: Stage, settings: Settings, earlier: "Nights") -> None:
        look = earlier.look
        made = {
            table.name: partition
            for one in (*stage.upstream, stage)
            for table, partition in zip(one.tables, look.made(one), strict=True)
        }
        check_laws(stage.kind, stage.ds, stage.input_rows, made, settings)
        findings = [
            _accept(one, self._accepted.gates)
            for one in _findings(settings, stage.ds, stage.kind, made, earlier)
        ]
        self.findings[stage.run_id] = findings
        if any(one.level == FAIL for one in findings):
            raise gates.refusal(stage.ds, stage.kind, findings, self._accepted.gates)
        making.note_gates(stage, [self._noted(one) for one in self.told_of(stage)])

    def told_of(self, stage: Stage) -> list[Finding]:
        """Returns what was found of a stage that an operator should know, though it may pass."""
        found = self.findings.get(stage.run_id, ())
        return [one for one in found if one.level in (WARN, ACCEPTED)]

    def unneeded(self) -> list[str]:
        """Returns the gates that were accepted and refused nothing."""
        found = [one for stage in self.findings.values() for one in stage]
        needed = {one.gate for one in found if one.level == ACCEPTED}
        return [name for name in self._accepted.gates if name not in needed]

    def _noted(self, finding: Finding) -> dict[str, object]:
        """Returns what a manifest says of a finding."""
        reason = {"reason": self._accepted.reason} if finding.level == ACCEPTED else {}
        return {**finding.as_json(), "text": gates.short(finding), **reason}


def _accept(finding: Finding, accepted: Collection[str]) -> Finding:
    if finding.level == FAIL and finding.gate in accepted:
        return replace(finding, level=ACCEPTED)
    return finding


# ---- What is published -------------------------------------------------------------------------


def judge_published(settings: Settings, ds: dt.date, kind: Kind, look: Look) -> list[Finding]:
    """Judges again what is published of a stage; what an operator had accepted is accepted.

    Days that were published since count as well: those before ds. Raises InputNotReady where a
    table of the stage, or one that it reads, is not published.
    """
    layout = settings.layout
    tables = [table for one in KINDS for table in one.tables if one in (*_READS[kind], kind)]
    there = {table.name: look.published(layout.folder(table, ds)) for table in tables}
    made = {name: partition for name, partition in there.items() if partition}
    if missing := [name for name in there if name not in made]:
        raise InputNotReady(f"{', '.join(missing)} of ds {ds} not published")
    noted = made[kind.tables[0].name].manifest.get("gates", ())
    accepted = {gate["gate"] for gate in noted if gate["level"] == ACCEPTED}
    findings = _findings(settings, ds, kind, made, Nights(layout, look))
    return [_accept(one, accepted) for one in findings]


_READS: Mapping[Kind, tuple[Kind, ...]] = {
    kind: (EMBED,) if ITEM_FEATURES in kind.tables else () for kind in KINDS
}


# ---- What both do ------------------------------------------------------------------------------


def _findings(
    settings: Settings, ds: dt.date, kind: Kind, made: Made, earlier: "Nights"
) -> list[Finding]:
    """Asks the gates about a stage; a cluster that is too large is looked into."""
    compared = [*kind.tables, *([USER_HISTORIES] if kind is SIMSCORE else [])]
    evidence = Evidence(
        {name: partition.manifest for name, partition in made.items()},
        {table.name: earlier.manifests(table, ds) for table in compared},
        ds in settings.closed_days,
    )
    found = gates.judge(kind, evidence, settings.gates)
    return [_with_picture(f, made) if f.gate == "balance" and f.level == FAIL else f for f in found]


class Nights:
    """Finds what earlier days have of a table: what is published, or was made for `nights`."""

    def __init__(self, layout: Layout, look: Look, nights: Sequence[Night] = ()):
        self.look, self._layout, self._nights = look, layout, {night.ds: night for night in nights}
        self._days: dict[str, list[dt.date]] = {}  # by table: a folder of many days is listed once

    def leave_out(self, ds: dt.date) -> None:
        """Forgets what was made for a day: it will not be published."""
        del self._nights[ds]

    def manifests(self, table: Table, ds: dt.date) -> list[Manifest]:
        """Returns the manifests of the newest days before ds, at most `gates.NIGHTS` of them."""
        if table.name not in self._days:
            self._days[table.name] = sorted({*self._nights, *self._layout.begun_days(table)})
        days = self._days[table.name]
        before = reversed(days[: bisect.bisect_left(days, ds)])
        there = filter(None, (self._partition(table, day) for day in before))
        return [partition.manifest for partition in islice(there, gates.NIGHTS)]

    def _partition(self, table: Table, ds: dt.date) -> Partition | None:
        stages = self._nights[ds].stages if ds in self._nights else ()
        for stage in stages:
            if table in stage.tables and self.look.state(stage).is_made:
                return self.look.table(stage, table)
        return self.look.published(self._layout.folder(table, ds))


def check_laws(kind: Kind, ds: dt.date, input_rows: int, made: Made, settings: Settings) -> None:
    """Raises DataContractError where a law of DESIGN §3 that joins tables does not hold.

    So it is for a catalogue without one readable image. The arguments are those of `gates`.
    """
    counts = {
        one: dict(ChainMap(*(gates.counts_of(made[table.name].manifest) for table in one.tables)))
        for one in {*KINDS, kind}
        if all(table.name in made for table in one.tables)
    }
    try:
        gates.check_laws(kind, input_rows, counts)
        if kind is EMBED:
            _refuse_none_usable(counts[EMBED], settings)
    except DataContractError as error:
        raise DataContractError(f"ds {ds}: {error}") from error


def _refuse_none_usable(counts: Mapping[str, int], settings: Settings) -> None:
    catalogue, rejects = counts["catalogue_items"], counts[f"{ITEM_REJECTS.name}_rows"]
    if catalogue and rejects == catalogue and "vectors_read" in counts:
        raise DataContractError(
            f"Not one of the {catalogue:,} catalogue items has a usable vector, of "
            f"{counts['vectors_read']:,} that were read ({gates.reasons(counts)}). The table would "
            "be empty of embeddings. Check that the table of vectors is that of this shop's items, "
            "by the same IDs, and of this day."
        )
    if catalogue and rejects == catalogue:
        raise DataContractError(
            f"Not one of the {catalogue:,} catalogue images can be read ({gates.reasons(counts)}). "
            "The table would be empty of embeddings. Relative image_uri are looked up below "
            f"{settings.catalogue.image_roots[0]}: check catalogue.image_roots in the settings and "
            "whether the images are there."
        )


# ---- A cluster that is too large ---------------------------------------------------------------


def _with_picture(finding: Finding, made: Made) -> Finding:
    """Says of a cluster that is too large whether it is so for copies of one picture."""
    from feature_jobs.items.item_features import most_frequent_picture

    features = made[ITEM_FEATURES.name]
    found = features.manifest["clusters"][finding.subject]
    try:
        picture = most_frequent_picture(
            made[ITEM_EMBEDDINGS.name], features, finding.subject, found["largest_cluster"]
        )
    except (OSError, ArrowInvalid, CourierError):  # of published tables a file may be damaged
        return finding
    why = why_large(found["items_max"], found["items"], finding.limits.fail, picture)
    return replace(finding, cause=why, examples=(picture.item_id,))


def why_large(items: int, total: int, limit: float, picture: "SamePicture") -> str:
    """Tells why a cluster has `items` of `total`: for copies of one picture, or without them.

    Of a cluster hardly above the limit, any one picture is what makes it too large: that puts it
    down to a placeholder only where most of its items have it.
    """
    copies = items * picture.items / picture.looked_at
    are_most = picture.items >= max(2, picture.looked_at / 2)
    if not are_most or items - copies > limit * (total - copies):
        return gates.CAUSES["balance"]
    return (
        f"{picture.items:,} of the {picture.looked_at:,} of them that were looked at have the very "
        f"same picture, byte for byte (sha256 {picture.sha256}, for example item "
        f"{picture.item_id!r}): a placeholder, and no fault of the encoder. Leave the image_uri of "
        "such items null in the catalogue: they get cluster ID 0 then, and count for the gate "
        "image_coverage alone. Where it is a vector of your own: leave such rows out, accept the "
        "gate outage once, and raise the limit of rejects, which those items are then"
    )
