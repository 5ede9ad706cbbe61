#!/usr/bin/env bash
# Large corpora are shipped as .jsonl.zst files of many frames (pzstd, parallel or appended writes), and downloads break off.
#
# Behaviour (zstandard 0.25.0, the Python package that readers of such corpora use):
#   * decompress() and read_to_iter() return the first frame of a valid file of two frames and stop without an error, while
#     open(), stream_reader() and copy_stream() return both: the corpus depends on the call that reads it.
#   * open() and stream_reader() return less than a truncated frame holds, here nothing at all, without an error; gzip, bz2
#     and lzma of the standard library raise EOFError in this case.
# Output seen on 2026-11-27 is at the end of this file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zstandard==0.25.0
cat > "$folder/run.py" <<'PY'
import gzip
import io

import zstandard

print("zstandard", zstandard.__version__)
frame = zstandard.ZstdCompressor().compress(b"x" * 1000)


def lengths(content):
    reader = zstandard.ZstdDecompressor()
    copied = io.BytesIO()
    reader.copy_stream(io.BytesIO(content), copied)
    return {
        "decompress": len(reader.decompress(content)),
        "read_to_iter": sum(map(len, reader.read_to_iter(io.BytesIO(content)))),
        "open": len(zstandard.open(io.BytesIO(content)).read()),
        "stream_reader": len(reader.stream_reader(io.BytesIO(content)).read()),
        "copy_stream": len(copied.getvalue()),
    }


two = lengths(frame + frame)
print("two frames of 1000 bytes:", two)
assert two == {"decompress": 1000, "read_to_iter": 1000, "open": 2000, "stream_reader": 2000, "copy_stream": 2000}
broken = len(zstandard.open(io.BytesIO(frame[:-3])).read())
print("a frame of 1000 bytes without its last 3 compressed bytes, by open():", broken)
assert broken == 0
try:
    gzip.open(io.BytesIO(gzip.compress(b"x" * 1000)[:-3])).read()
except EOFError as error:
    print("the same by gzip: EOFError,", error)
else:
    raise AssertionError
PY
"$folder/venv/bin/python" "$folder/run.py"
# Output:
#   two frames of 1000 bytes: {'decompress': 1000, 'read_to_iter': 1000, 'open': 2000, 'stream_reader': 2000, 'copy_stream': 2000}
#   a frame of 1000 bytes without its last 3 compressed bytes, by open(): 0
#   the same by gzip: EOFError, Compressed file ended before the end-of-stream marker was reached
