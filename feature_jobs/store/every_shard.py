"""Makes elements of a pipeline of the keys of all shards, so that none of them is left out."""

from collections.abc import Sequence

import apache_beam as beam


def every_shard(root: beam.Pipeline, shards: int) -> beam.PCollection:
    """Returns (shard, b"") for every shard, so that one without rows still makes an empty part."""
    return root | "EveryShard" >> beam.Create([(shard, b"") for shard in range(shards)])


def every_shard_of_days(root: beam.Pipeline, shards: Sequence[int]) -> beam.PCollection:
    """Returns ((day, shard), b"") for every shard of every day."""
    keys = [((day, shard), b"") for day, n in enumerate(shards) for shard in range(n)]
    return root | "EveryShardOfDays" >> beam.Create(keys)
