"""JSON survives the file, and equal values have one digest."""

import hashlib
from pathlib import Path

import pytest

from feature_jobs.schemas import DataContractError
from feature_jobs.store import documents


def test_equal_values_have_one_digest_and_others_another() -> None:
    value = {"b": [1, 2.5, None], "a": {"y": "é", "x": True}}
    again = {"a": {"x": True, "y": "é"}, "b": [1, 2.5, None]}
    assert documents.canonical_json(value) == '{"a":{"x":true,"y":"é"},"b":[1,2.5,null]}'.encode()
    assert documents.digest(value) == documents.digest(again)
    assert documents.digest(value) == hashlib.sha256(documents.canonical_json(value)).hexdigest()
    assert len({documents.digest(v) for v in (value, [1, 2], [2, 1], ["1", 2], 1, "1", None)}) == 7


def test_json_survives_the_file_and_damage_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    documents.write_json(path, {"name": "衣服", "rows": 3})
    assert documents.read_json(path) == {"name": "衣服", "rows": 3}
    with pytest.raises(FileNotFoundError):
        documents.read_json(str(tmp_path / "none.json"))
    for damaged in (Path(path).read_bytes()[:-4], b"\xff\xfe", b""):
        Path(path).write_bytes(damaged)
        with pytest.raises(DataContractError) as found:
            documents.read_json(path)
        assert path in str(found.value)
        assert "\n" not in str(found.value)
