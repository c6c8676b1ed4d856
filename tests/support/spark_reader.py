"""Reads with Spark what a test asks for: a program for an environment that has pyspark alone.

`spark_reader.py ASKED OUT`: ASKED is JSON with SQL `statements` to run first, and, by name, the
paths that are `read` as Parquet and the `tables` that are known by then. What each holds is written
below the folder OUT, as Parquet.
"""

import json
import sys
from pathlib import Path

from pyspark.sql import SparkSession


def main(asked_at: str, out: str) -> None:
    """Does what the file `asked_at` says."""
    asked = json.loads(Path(asked_at).read_text())
    settings = {
        "spark.ui.enabled": "false",
        "spark.driver.host": "localhost",
        "spark.sql.warehouse.dir": f"{out}-warehouse",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
        "spark.sql.shuffle.partitions": "1",
    }
    builder = SparkSession.builder.master("local[2]")
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    for statement in asked["statements"]:
        spark.sql(statement)
    found = {name: spark.read.parquet(*paths) for name, paths in asked["read"].items()}
    found |= {name: spark.table(table) for name, table in asked["tables"].items()}
    for name, frame in found.items():
        frame.coalesce(1).write.parquet(f"{out}/{name}")
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
