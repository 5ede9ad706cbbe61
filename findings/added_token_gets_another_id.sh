#!/usr/bin/env bash
# A tokenizer.json lists its added tokens with their ids. Padded vocabularies leave gaps: a token is placed at a round id, or
# behind the rows of the padding.
#
# Behaviour (tokenizers 0.23.3): the id in the file is not used for a token that the model's vocabulary does not hold: it gets
# the next free one (10 becomes 3), without a warning. Training and inference then use another row of the embedding than the
# file says. An id that no token has is decoded to nothing, without an error.
# Output seen on 2026-11-27 is at the end of this file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cat > "$folder/run.py" <<'PY'
import json

import tokenizers
from tokenizers import Tokenizer, models

tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
content = json.loads(tokenizer.to_str())
flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
content["added_tokens"].append({"id": 10, "content": "<tool>", "special": True, **flags})
loaded = Tokenizer.from_str(json.dumps(content))
written = json.loads(loaded.to_str())["added_tokens"][0]["id"]
print("tokenizers", tokenizers.__version__)
print(f"<tool> has id 10 in the file, {loaded.token_to_id('<tool>')} when loaded, {written} when saved again")
print(f"ids 2, 10, 99 are decoded to {loaded.decode([2, 10, 99])!r}")
assert (loaded.token_to_id("<tool>"), written, loaded.decode([2, 10, 99])) == (3, 3, "a")
PY
"$folder/venv/bin/python" "$folder/run.py"
# Output:
#   <tool> has id 10 in the file, 3 when loaded, 3 when saved again
#   ids 2, 10, 99 are decoded to 'a'
