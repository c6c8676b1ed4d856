"""The text tower gives each title a vector of its own; all weights learn, no code is loaded."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from courier_model.projection import EMBEDDING_DIM
from courier_model.training.titles import MAX_TOKENS, TextTower
from feature_jobs.schemas import OperatorError

# A title's place in its batch, and what it is padded to, change how its products are added up.
ROUNDING = {"rtol": 0.0, "atol": 1e-5}
TITLES = ["wool dress", "lamp", "long red dress with shoe of Marlo", ""]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def tower(bert: Path) -> TextTower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TextTower(str(bert), EMBEDDING_DIM)


def copy(folder: Path, to: Path, without: str = "") -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if not without or not file.match(without):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def refusal(name: str, *told: str) -> None:
    """The model is refused in one paragraph that names it and the cause."""
    with pytest.raises(OperatorError) as refused:
        TextTower(name, EMBEDDING_DIM)
    message = str(refused.value)
    assert "\n" not in message
    for words in (name, *told):
        assert words in message


# ---- Vectors ---------------------------------------------------------------------------------


def test_every_title_gets_a_vector_of_its_own(tower: TextTower) -> None:
    vectors = tower.eval()(TITLES)
    assert vectors.shape == (len(TITLES), EMBEDDING_DIM)
    assert vectors.dtype == torch.float32
    assert torch.isfinite(vectors).all()
    apart = torch.cdist(vectors, vectors) + 10 * torch.eye(len(TITLES))
    assert apart.min() > 0.1
    assert (vectors.norm(dim=1) - 1).abs().min() > 1e-3  # not normalised


def test_the_width_is_a_parameter(bert: Path) -> None:
    assert TextTower(str(bert), dim=7)(["lamp"]).shape == (1, 7)


def test_titles_of_other_lengths_in_the_batch_change_nothing(tower: TextTower) -> None:
    tower.eval()
    together = tower(TITLES)
    alone = torch.cat([tower([title]) for title in TITLES])
    torch.testing.assert_close(together, alone, **ROUNDING)


def test_the_tower_drops_out_in_training_mode_and_is_deterministic_in_eval_mode(
    tower: TextTower,
) -> None:
    assert all(module.training for module in tower.modules())
    assert not torch.equal(tower(TITLES), tower(TITLES))
    tower.eval()
    assert torch.equal(tower(TITLES), tower(TITLES))


def test_only_the_first_tokens_count(tower: TextTower) -> None:
    tower.eval()
    fits = ["wool"] * (MAX_TOKENS - 2)  # [CLS] and [SEP] are tokens too
    texts = [fits, [*fits, "shoe"], ["shoe", *fits[1:]], [*fits[1:], "shoe"]]
    whole, cut, first, last = tower([" ".join(text) for text in texts])
    torch.testing.assert_close(whole, cut, **ROUNDING)
    assert not torch.allclose(whole, first, atol=1e-4)
    assert not torch.allclose(whole, last, atol=1e-4)


def test_under_autocast_vectors_are_float32(tower: TextTower) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert tower(TITLES).dtype == torch.float32


# ---- Weights ---------------------------------------------------------------------------------


def test_the_weights_are_those_of_the_folder_and_the_head_is_of_torchs_seed(bert: Path) -> None:
    saved = load_file(bert / "model.safetensors")
    towers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        towers.append(TextTower(str(bert), EMBEDDING_DIM))
    loaded = towers[0].model.state_dict()
    assert len(loaded) > 10
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.items())
    assert torch.equal(towers[0].head.weight, towers[1].head.weight)
    assert not torch.equal(towers[0].head.weight, towers[2].head.weight)


def test_gradients_reach_every_weight(tower: TextTower) -> None:
    # Two titles' distance, not a sum: to that, all but a constant is blind after a layer norm.
    one, other = tower(["wool dress", "lamp"])
    (one - other).pow(2).sum().backward()
    found = {
        name: None if parameter.grad is None else float(parameter.grad.abs().sum())
        for name, parameter in tower.named_parameters()
    }
    assert len(found) > 15
    assert None not in found.values()
    assert found["model.embeddings.word_embeddings.weight"] > 0
    assert found["model.encoder.layer.0.attention.self.query.weight"] > 0
    assert found["head.weight"] > 0


def test_no_title_gives_no_vector_and_gradients_of_zero(tower: TextTower) -> None:
    vectors = tower([])
    assert vectors.shape == (0, EMBEDDING_DIM)
    vectors.sum().backward()
    for parameter in tower.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_weights_in_half_precision_are_trained_in_float32(bert: Path, tmp_path: Path) -> None:
    half = copy(bert, tmp_path / "half", without="model.safetensors")
    BertModel.from_pretrained(bert).bfloat16().save_pretrained(half)
    assert {str(p.dtype) for p in TextTower(str(half), EMBEDDING_DIM).parameters()} == {
        "torch.float32"
    }


# ---- Refused ---------------------------------------------------------------------------------


def test_without_transformers_the_refusal_says_how_to_install_it(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OperatorError, match=r"pip install '\.\[clip\]'"):
        TextTower(str(bert), EMBEDDING_DIM)


def test_a_name_without_a_model_is_refused(tmp_path: Path) -> None:
    refusal(str(tmp_path / "nowhere"), "cannot be loaded")
    refusal("nobody/never-made", "couldn't connect")
    (tmp_path / "empty").mkdir()
    refusal(str(tmp_path / "empty"), "cannot be loaded")


def test_weights_that_would_have_to_be_unpickled_are_refused(bert: Path, tmp_path: Path) -> None:
    pickled = copy(bert, tmp_path / "pickled", without="model.safetensors")
    torch.save(load_file(bert / "model.safetensors"), pickled / "pytorch_model.bin")
    refusal(str(pickled), "no file named model.safetensors", "could run anything")


def test_a_models_own_code_is_not_run(bert: Path, tmp_path: Path) -> None:
    own = copy(bert, tmp_path / "own", without="config.json")
    (own / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = '{"AutoConfig": "code.Config", "AutoModel": "code.Model"}'
    (own / "config.json").write_text(f'{{"model_type": "own", "auto_map": {auto}}}')
    refusal(str(own), "trust_remote_code")
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_refused(bert: Path, tmp_path: Path) -> None:
    damaged = copy(bert, tmp_path / "damaged")
    content = (bert / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    refusal(str(damaged), "cannot be loaded")


def test_a_model_without_some_of_its_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    masked = copy(bert, tmp_path / "masked")
    kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, masked / "model.safetensors", {"format": "pt"})
    assert TextTower(str(masked), EMBEDDING_DIM)  # a pooler is not needed
    kept.pop("encoder.layer.0.output.dense.weight")
    save_file(kept, masked / "model.safetensors", {"format": "pt"})
    refusal(str(masked), "lacks 1 of its weights", "encoder.layer.0.output.dense.weight")


def test_a_model_without_a_vocabulary_is_refused(bert: Path, tmp_path: Path) -> None:
    refusal(str(copy(bert, tmp_path / "bare", without="*token*")), "no vocabulary")


def test_another_models_vocabulary_is_refused(bert: Path, tmp_path: Path) -> None:
    other = copy(bert, tmp_path / "other")
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    tokenizer.add_tokens(["sofa"])
    tokenizer.save_pretrained(other)
    refusal(str(other), "more words than itself")


def test_a_model_that_reads_forwards_only_is_refused(tmp_path: Path) -> None:
    # Its first token knows nothing of those that follow.
    words = {word: number for number, word in enumerate(["[UNK]", "wool", "lamp"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(words), n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2Model(config).save_pretrained(tmp_path)
    refusal(str(tmp_path), "is a GPT2Model")
