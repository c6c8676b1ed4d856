"""The held-out measure is what plain loops over single images and rows make of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from courier_model.images import decode
from courier_model.projection import EMBEDDING_DIM
from courier_model.training.evaluate import Evaluation
from courier_model.training.image_cache import ImageCache
from courier_model.training.objectives import build_objective
from pipelines.artefacts.held_out import histories_of
from tests.support import model_oracles
from tests.support.training_runs import (
    ALONE,
    BAD,
    DAY_US,
    GOOD,
    LAW,
    MISSING,
    TINY,
    slow_history,
    small_encoder,
    some_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_clicks_are_ranked_as_by_loops_over_single_images(image_root: str) -> None:
    train, rows = some_rows(9, seed=5), some_rows(12, seed=4)
    rows.moments[:] += DAY_US
    rows.clicks[0] = -1  # no history, so not measured
    rows.clicks[1], rows.users[1] = [MISSING, -1, -1, -1, -1], 9  # none that can be seen
    encoder = small_encoder(TINY.backbone, "random", 32, seed=0)
    cache = ImageCache(None, rows.items["image_uri"], (image_root,), encoder.preprocessing)
    rows = rows.with_history()
    evaluation = Evaluation(rows, histories_of(rows, [train, rows], LAW), cache)
    vectors = evaluation.embed(encoder.features, 32, ALONE)
    found = evaluation.rank_clicks(vectors)

    embedding = {}
    for number in GOOD:
        content = Path(image_root, f"{number}.png").read_bytes()
        pixels = torch.from_numpy(decode(content, encoder.preprocessing))[None]
        with torch.no_grad():
            embedding[number] = encoder(pixels)[0].double().numpy()
    scored, lengths = [], []
    for row, (pv, clicked) in enumerate(zip(rows.pv, rows.clicked, strict=True)):
        history = slow_history(rows, row, [train, rows], LAW)
        past = [embedding[item] for item in history if item in embedding]
        lengths.append(len(past))
        for item, label in zip(pv, clicked, strict=True):
            if past and item in embedding:
                cosines = [cosine(embedding[item], one) for one in past]
                scored.append((np.mean(cosines), round(max(cosines), 6), label))
    assert found.impressions == len(scored) < (rows.pv >= 0).sum()
    assert found.clicks == sum(label for _, _, label in scored)
    assert max(lengths) > 5
    for place, measured in enumerate((found.auc, found.max_auc)):
        won = [
            (high[place] > low[place]) + 0.5 * (high[place] == low[place])
            for high in scored
            for low in scored
            if high[2] and not low[2]
        ]  # fmt: skip
        # Squares are cut once where `decode` cuts twice: up to a pixel apart.
        assert measured is not None
        assert measured.value == pytest.approx(np.mean(won), abs=0.02)


def test_nearest_is_the_share_of_reconstructions_that_find_their_own(image_root: str) -> None:
    rows = some_rows(12, seed=4)
    rows.clicks[1] = [MISSING, -1, -1, -1, -1]
    rows.clicks[2] = [MISSING, 4, 5, -1, -1]  # of which the first must not hide the others
    preprocessing = small_encoder(TINY.backbone, "random", 32, 0).preprocessing
    cache = ImageCache(None, rows.items["image_uri"], (image_root,), preprocessing)
    evaluation = Evaluation(rows, rows.clicks, cache)
    vectors = evaluation.colours(ALONE)
    values = torch.tensor(vectors.values)
    values = torch.cat([values, torch.zeros(len(values), 256 - values.shape[1])], dim=1)
    vectors = replace(vectors, values=values.numpy())
    objective = build_objective("no-reconstruction", EMBEDDING_DIM, None, None)
    found = evaluation.nearest(vectors, objective, 100, ALONE.device)

    codes = np.unique(np.concatenate([rows.pv, rows.clicks], axis=1))
    codes = codes[codes >= 0].tolist()
    assert vectors.known.tolist() == [code not in BAD for code in codes]

    def seen(items: np.ndarray) -> list[int]:
        return [codes.index(item) if item in GOOD else -1 for item in items.tolist()]

    listed = [
        model_oracles.Row(seen(pv), [bool(c) and p in GOOD for c, p in zip(y, pv, strict=True)], c)
        for pv, y, c in zip(rows.pv, rows.clicked, map(seen, rows.clicks), strict=True)
    ]
    listed = [row for row in listed if any(row.clicked) and max(row.clicks) >= 0]
    wanted = model_oracles.pv(
        values.double().tolist(), vectors.keys.tolist(), listed, model_oracles.mean, 0.05
    )
    assert 0 < min(wanted.hits) <= max(wanted.hits) < wanted.anchors
    assert found in [pytest.approx(hits / wanted.anchors) for hits in wanted.hits]
    simsiam = build_objective("simsiam", EMBEDDING_DIM, None, None)
    assert evaluation.nearest(vectors, simsiam, 9, ALONE.device) is None
