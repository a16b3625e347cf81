"""Models as mlc_llm writes them: weights, configuration and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .models import simple_model

__all__ = ["CHAT_CONFIG", "mlc_model", "write_json"]

#: A configuration with all fields that mlc_llm requires.
CHAT_CONFIG: dict[str, Any] = {
    "version": "0.1.0",
    "model_type": "llama",
    "quantization": "q4f16_1",
    "model_config": {"hidden_size": 64, "vocab_size": 32},
    "vocab_size": 32,
    "context_window_size": 2048,
    "sliding_window_size": -1,
    "prefill_chunk_size": 2048,
    "attention_sink_size": -1,
    "tensor_parallel_shards": 1,
    "tokenizer_files": ["tokenizer.json", "tokenizer_config.json"],
    "conv_template": {"name": "llama-3", "roles": {"user": "user", "assistant": "assistant"}},
}
#: A tokenizer that the tokenizers library opens.
_TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "decoder": {"type": "ByteFallback"},
    "model": {"type": "WordLevel", "vocab": {"hello": 0, "world": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
}


def mlc_model(directory: Path, shards: int = 3, **config: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model with its configuration and tokenizer; `config` replaces fields of the configuration.

    Returns
    -------
    dict
        Its tensors, see `simple_model`.
    """
    arrays = simple_model(directory, shards=shards)
    write_json(directory / "mlc-chat-config.json", {**CHAT_CONFIG, **config})
    write_json(directory / "tokenizer.json", _TOKENIZER)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return arrays


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
