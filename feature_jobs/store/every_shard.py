"""Makes elements of a pipeline of the keys of all shards, so that none of them is left out.

They are grouped by what receives them: to spread them over the workers before would be in vain.
Where something must come from each shard of the step before, it is looked whether all of it came:
there are runners that lose elements and end well.
"""

from collections.abc import Sequence

import apache_beam as beam

from feature_jobs.schemas import DataContractError


def every_shard(root: beam.Pipeline, shards: int) -> beam.PCollection:
    """Returns (shard, b"") for every shard, so that one without rows still makes an empty part."""
    keys = [(shard, b"") for shard in range(shards)]
    return root | "EveryShard" >> beam.Create(keys, reshuffle=False)


def every_shard_of_days(root: beam.Pipeline, shards: Sequence[int]) -> beam.PCollection:
    """Returns ((day, shard), b"") for every shard of every day."""
    keys = [((day, shard), b"") for day, n in enumerate(shards) for shard in range(n)]
    return root | "EveryShardOfDays" >> beam.Create(keys, reshuffle=False)


def check_all_came(what: str, found: int, expected: int) -> None:
    """Raises DataContractError where not all came that the steps before have handed on."""
    if found != expected:
        raise DataContractError(
            f"{what}: {found:,} of {expected:,} came. The runner lost some without an error, or "
            "handed some on twice; tables would lack rows, so that nothing was published. Run the "
            "command again; if it happens again, run it on this machine (without --runner) and "
            "report it."
        )
