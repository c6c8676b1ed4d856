"""Embeds item titles beside the image encoder: the text tower of the CLIP baseline.

COURIER appendix §4 compares with CLIP (arXiv 2103.00020): pairs of image and title, those of the PV
items only; the text tower starts from a pre-trained language model (a Chinese BERT), τ = 0.1. It
serves training alone and is not part of the saved encoder.

Hugging Face's `transformers` comes with the extra `clip` and is imported only where a tower is
made. Weights are read from safetensors alone and no code of a model's author is run.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from feature_jobs.schemas import OperatorError

# Of a title, the tokens that set an item apart come early; BERT's cost grows with the rest.
MAX_TOKENS = 64

# What transformers raises, as seen: no such folder or no connection; a folder without a model, a
# name that is none; tensors of other shapes; a tokenizer's own packages are missing; damaged files.
_UNUSABLE = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


class TextTower(nn.Module):
    """Embeds titles: the last hidden state of the first token ([CLS]), through a `Linear`.

    `name_or_path` is a model of the Hugging Face hub, downloaded or from its cache (`HF_HOME`), or
    a folder as `save_pretrained` writes it. The `Linear` to `dim` is new, of torch's current seed.

    Raises OperatorError where transformers is not installed, and for a model that cannot be loaded,
    has weights in other files than safetensors, or is no BERT-like encoder.
    """

    def __init__(self, name_or_path: str, dim: int) -> None:
        super().__init__()
        self.tokenizer, self.model = _load(name_or_path)
        self.head = nn.Linear(self.model.config.hidden_size, dim)
        self.train()  # transformers hands out models in eval mode, torch its own in training mode

    def forward(self, titles: list[str]) -> Tensor:
        """Embeds titles `[n]`: float32 `[n, dim]`, not normalised; only the first 64 tokens count.

        The vectors are on the module's device. Padding is masked: a row does not depend on the
        other titles, but for float rounding.
        """
        # Without a title, one is read and dropped: the weights then get gradients of 0, not none,
        # for which DDP would wait.
        tokens = self.tokenizer(
            titles or [""],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.head.weight.device)
        states = self.model(**tokens).last_hidden_state  # [n, tokens, hidden]
        vectors: Tensor = self.head(states[: len(titles), 0])
        return vectors.float()  # autocast would leave bf16


def _load(name_or_path: str) -> tuple[Any, Any]:
    """Loads a tokenizer, and a language model of which every weight came from the checkpoint."""
    # Where a model of the hub has no safetensors, transformers would have them made by a service,
    # and send it the user's token.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        from transformers import AutoModel, AutoTokenizer, logging
    except ImportError as error:
        raise OperatorError(
            f"The titles need a language model, but the package transformers cannot be imported: "
            f"{_one_line(error)}. It is optional, since nothing but the CLIP baseline needs it. "
            "Install it with pip install '.[clip]' in COURIER's own folder."
        ) from error
    logging.set_verbosity_error()  # its report of tensors not needed; we refuse where some lack
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        model, loading = AutoModel.from_pretrained(
            name_or_path,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,  # else that of the checkpoint
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise OperatorError(
            f"The language model {name_or_path!r} cannot be loaded: {_one_line(error)} Expected is "
            "a model of the Hugging Face hub, such as google-bert/bert-base-chinese, or the path "
            "of a folder with one: its configuration, its tokenizer and model.safetensors. Weights "
            "in other files and a model's own code are refused, since they could run anything."
        ) from error
    _check(name_or_path, tokenizer, model, loading["missing_keys"])
    # A layer above [CLS] that the loss does not reach. Without gradients it would stop DDP.
    model.pooler = None
    return tokenizer, model


def _check(name: str, tokenizer: Any, model: Any, missing_keys: set[str]) -> None:
    """Refuses what loads without an error and yet makes no text tower."""
    # A pooler is dropped anyhow, and the usual checkpoints of masked language models have none.
    missing = sorted(key for key in missing_keys if not key.startswith("pooler."))
    if missing:
        fault = f"lacks {len(missing)} of its weights, such as {', '.join(missing[:3])}"
    elif len(tokenizer) <= len(tokenizer.all_special_ids):
        fault = "has no vocabulary beside it, so that all words would be one"
    elif len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fault = "has a tokenizer with more words than itself, so not its own"
    elif model.config.is_encoder_decoder or tokenizer.cls_token is None:
        fault = f"is a {type(model).__name__}, in which no first token stands for the whole text"
    else:
        return
    raise OperatorError(
        f"The language model {name!r} {fault}. Titles would be embedded by chance. Take a whole "
        "model of BERT's kind, such as google-bert/bert-base-chinese."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
