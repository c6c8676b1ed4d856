"""Reads a training set with FuxiCTR: a program for an environment that has FuxiCTR beside ours.

`fuxictr_reader.py CONFIG OUT`: CONFIG is a folder with a `dataset_config.yaml`. FuxiCTR makes its
feature map of it, which is printed, its loader reads the rows in their order, and its embedding
layer takes each batch. What arrived is written to OUT, as npz: a column each.
"""

import logging
import sys

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding
from fuxictr.utils import load_dataset_config
from ray.data import DataContext


def main(config: str, out: str) -> None:
    """Does what FuxiCTR's own `run_expid.py` does, up to the first layer of a model."""
    params = load_dataset_config(config, "courier")
    params |= {"embedding_dim": 8, "batch_size": 256, "shuffle": False}
    processor = FeatureProcessor(**params)
    params["train_data"], params["valid_data"], _ = build_dataset(processor, **params)
    feature_map = FeatureMap("courier", processor.data_dir)
    feature_map.load(processor.json_file, params)
    with open(processor.json_file) as made:
        sys.stdout.write(made.read() + "\n")
    embed = FeatureEmbedding(feature_map, embedding_dim=8)
    DataContext.get_current().execution_options.preserve_order = True  # among files, to compare
    train, _ = RankDataLoader(feature_map, stage="train", **params)
    batches = []
    for batch in train:
        batches.append({name: column.numpy() for name, column in batch.items()})
        inputs = {name: batch[name] for name in feature_map.features}
        assert torch.isfinite(embed(inputs)).all()
    np.savez(out, **{name: np.concatenate([b[name] for b in batches]) for name in batches[0]})


if __name__ == "__main__":
    logging.disable(logging.INFO)
    main(*sys.argv[1:])
