"""Where a tokenizer is and of which kind: a file, a folder or a name; what cannot be read is named with the way out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_hyperp.errors import UsageError
from megatron_hyperp.files import read_json

TOKENIZER_JSON, SENTENCEPIECE, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Suffixes of names that mean a file even when it is missing.
_SUFFIXES = (".model", ".json", ".tiktoken")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# A line of a tiktoken file: the bytes of a token in base64, and its rank.
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_CONVERT = "save its tokenizer.json with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


def find_tokenizer(name: str) -> Path:
    """Return the file of a tokenizer: the path itself, or in a folder the file that transformers would read.

    Args:
        name: path of a file or of a folder.

    Raises:
        UsageError: a folder without a tokenizer, a name of the Hugging Face hub, or no such path.
    """
    path = Path(name)
    if os.path.isdir(name):
        for file in (TOKENIZER_JSON, SENTENCEPIECE):
            if os.path.isfile(path / file):
                return path / file
        raise UsageError(
            f"tokenizer folder {name} holds neither {TOKENIZER_JSON} nor {SENTENCEPIECE}; for a tokenizer in other"
            f" files, {_CONVERT}"
        )
    if os.path.exists(name) or path.suffix in _SUFFIXES:
        return path
    if _HUB_NAME.fullmatch(name):
        raise UsageError(
            f"tokenizer {name} is neither a file nor a folder, and nothing is downloaded from the Hugging Face hub; run"
            f" hf download {name} {TOKENIZER_JSON} {TOKENIZER_CONFIG} --local-dir FOLDER, and give FOLDER"
        )
    raise UsageError(
        f"tokenizer {name} does not exist; give a SentencePiece model, a Hugging Face tokenizer.json, a folder that"
        " holds one of them, or null:VOCAB_SIZE"
    )


def is_json(path: Path, content: bytes) -> bool:
    """Return whether a file is a ``tokenizer.json``, by its content; a name in ``.json`` decides for what is neither.

    Raises:
        UsageError: it is a tiktoken file.
    """
    if content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{":
        return True
    if _TIKTOKEN_LINE.match(content):
        raise UsageError(
            f"{path} is a tiktoken file, without the pattern and the special tokens of its tokenizer; {_CONVERT}"
        )
    return path.suffix == ".json"


def special_token(config: Path, name: str) -> str | None:
    """Return a token that a ``tokenizer_config.json`` names: a string, or an object with its ``content``.

    Args:
        config: the file; it may be missing.
        name: such as ``eos_token``.

    Raises:
        UsageError: the file is not JSON.
    """
    fields = read_tokenizer_config(config)
    token = fields.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_tokenizer_config(config: Path) -> dict[str, object]:
    """Return the fields of a ``tokenizer_config.json``; none if it is missing.

    Raises:
        UsageError: the file is not JSON.
    """
    if not config.is_file():
        return {}
    try:
        fields = read_json(config)
    except ValueError as error:
        raise UsageError(f"{config} is not JSON ({' '.join(str(error).split())}); repair or remove it") from error
    return fields if isinstance(fields, dict) else {}
