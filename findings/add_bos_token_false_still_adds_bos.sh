#!/usr/bin/env bash
# A model trained without a beginning-of-sequence token is exported with a tokenizer.json whose template adds one. To switch
# it off, "add_bos_token": false goes into tokenizer_config.json, as for Llama's tokenizers.
#
# Behaviour (transformers 5.23.0, tokenizers 0.23.3, PreTrainedTokenizerFast): the flag has no effect where a tokenizer.json
# is there. BOS is added whether the flag is true, false or absent, while the attribute add_bos_token is False in all three
# cases, so that the first token is predicted from a context that training never had. Only the post-processor inside
# tokenizer.json decides.
# Output seen on 2026-11-27 is at the end of this file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/run.py" <<'PY'
import json
import sys
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, processors

folder = Path(sys.argv[1])
tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
tokenizer.add_special_tokens(["<s>", "</s>"])
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
found = {}
for flag in (None, True, False):
    place = folder / str(flag)
    place.mkdir()
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if flag is None else {"add_bos_token": flag}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = transformers.AutoTokenizer.from_pretrained(place)
    found[flag] = loaded("a").input_ids
    print(f"add_bos_token {flag}: ids of 'a' are {found[flag]}, the attribute is {getattr(loaded, 'add_bos_token', None)}")
assert found == {None: [0, 2], True: [0, 2], False: [0, 2]}
PY
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
# Output:
#   add_bos_token None: ids of 'a' are [0, 2], the attribute is False
#   add_bos_token True: ids of 'a' are [0, 2], the attribute is False
#   add_bos_token False: ids of 'a' are [0, 2], the attribute is False
