"""Makes what several tests of the model read and none of them changes."""

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from courier_model.training import train as training_job
from courier_model.training.train import TrainingData
from tests.support.training_runs import BROKEN, GOOD, REPOST, small_encoder, training_data
from tests.support.world import picture


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a language model as small as can be, with the weights of a fixed seed."""
    from transformers import BertConfig, BertModel, BertTokenizerFast  # takes seconds

    folder = tmp_path_factory.mktemp("models") / "bert"
    vocabulary = tmp_path_factory.mktemp("words") / "vocab.txt"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "red", "wool", "dress", "shoe", "lamp", "long", "with", "of", "Marlo"]
    vocabulary.write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(vocabulary), do_lower_case=False).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.5,  # titles shall differ by more than rounding
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_encoders() -> Iterator[None]:
    """Training starts from encoders that are saved in no time."""
    with patch.object(training_job, "build_encoder", small_encoder):
        yield


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Writes the images of the items of `training_runs`."""
    folder = tmp_path_factory.mktemp("images")
    for number in GOOD:
        (folder / f"{number}.png").write_bytes(picture(2 if number == REPOST else number))
    (folder / f"{BROKEN}.png").write_bytes(b"<html>not found</html>")
    return str(folder)


@pytest.fixture
def data(image_root: str) -> TrainingData:
    return training_data(image_root)
