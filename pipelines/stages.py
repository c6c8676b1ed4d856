"""Names the kinds of stages, once. What depends on the kind of a stage asks for it by these.

A kind's name is that of its command, of its section `[beam.<name>]` and of its folder below
`_staging`.
"""

from dataclasses import dataclass, replace

from feature_jobs import schemas
from feature_jobs.schemas import Table


@dataclass(frozen=True)
class Kind:
    """Names a kind of stage and the tables that it makes.

    Tables of one `family` are locked together; locks are taken in the order of `KINDS`. It `uses`
    the shop's catalogue or impressions, and the encoder or codebook of the pin.
    """

    name: str
    family: str
    tables: tuple[Table, ...]
    uses: frozenset[str]

    def __hash__(self) -> int:
        return hash(self.name)  # not of all that there is to say of its tables, time and again

    @property
    def is_shared(self) -> bool:
        """Returns whether its tables are those of all feature sets."""
        return all(table.shared for table in self.tables)


EMBED = Kind(
    "embed", "items", (schemas.ITEM_EMBEDDINGS, schemas.ITEM_REJECTS),
    uses=frozenset(["catalogue", "pin"]),
)  # fmt: skip
ITEM_FEATURES = Kind(
    "item-features", "items", (schemas.ITEM_FEATURES,), uses=frozenset(["pin"])
)  # fmt: skip
HISTORIES = Kind(
    "histories", "impressions", (schemas.USER_HISTORIES, schemas.RECENT_CLICKS),
    uses=frozenset(["impressions"]),
)  # fmt: skip
SIMSCORE = Kind(
    "simscore", "impressions", (schemas.USER_SIMSCORES,), uses=frozenset(["impressions", "pin"])
)  # fmt: skip
TRAINING_ROWS = Kind(
    "training-rows", "training", (schemas.TRAINING_ROWS,), uses=frozenset(["impressions"])
)  # fmt: skip
JOIN = Kind("join", "joined", (schemas.JOINED,), uses=frozenset(["impressions"]))

ITEMS = (EMBED, ITEM_FEATURES)
NIGHT = (*ITEMS, HISTORIES, SIMSCORE)  # in the order in which they are made
KINDS = (*NIGHT, TRAINING_ROWS, JOIN)


def join_of(name: str) -> Kind:
    """Returns the kind of stage that makes the training set of this name, a table of its own."""
    return replace(JOIN, tables=(replace(schemas.JOINED, name=f"{schemas.JOINED.name}/{name}"),))


def kind_of(table: Table) -> Kind:
    """Returns the kind of stage that makes a table, or tables of its kind."""
    family = table.name.partition("/")[0]
    (kind,) = (kind for kind in KINDS if family in [one.name for one in kind.tables])
    return kind
