"""Makes elements of a pipeline of the keys of all shards, so that none of them is left out.

They are grouped by what receives them: to spread them over the workers before would be in vain.
"""

from collections.abc import Sequence

import apache_beam as beam


def every_shard(root: beam.Pipeline, shards: int) -> beam.PCollection:
    """Returns (shard, b"") for every shard, so that one without rows still makes an empty part."""
    keys = [(shard, b"") for shard in range(shards)]
    return root | "EveryShard" >> beam.Create(keys, reshuffle=False)


def every_shard_of_days(root: beam.Pipeline, shards: Sequence[int]) -> beam.PCollection:
    """Returns ((day, shard), b"") for every shard of every day."""
    keys = [((day, shard), b"") for day, n in enumerate(shards) for shard in range(n)]
    return root | "EveryShardOfDays" >> beam.Create(keys, reshuffle=False)
