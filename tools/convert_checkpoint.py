"""Convert a checkpoint: ours, Hugging Face's, Megatron-LM's, ArchScale's; cut it anew, or average several.

Tensor by tensor, so that memory does not grow with the model. The output takes its name when it is whole.
"""

import argparse
import re

from megatron_hyperp.convert.convert import FROM, TO, Job, convert
from megatron_hyperp.convert.source import DTYPES
from megatron_hyperp.convert.writing import Layout
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    result = argparse.ArgumentParser(
        description=__doc__, epilog="--debug shows the traceback of an error.", allow_abbrev=False
    )
    result.add_argument("--from", dest="source", choices=FROM, required=True, help="format to read")
    result.add_argument("--to", dest="target", choices=TO, required=True, help="format to write")
    result.add_argument(
        "--input", type=local_path, required=True, help="folder to read (of several iterations: the newest), or file"
    )
    result.add_argument("--output", type=local_path, required=True, help="folder to write; it must not be there yet")
    result.add_argument("--dtype", choices=DTYPES, help="of the weights written [as they are]")
    result.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that the output is cut for [1]")
    result.add_argument("--pp", type=int, default=1, help="pipeline stages, each with files of its own [1]")
    result.add_argument("--ep", type=int, default=1, help="expert-parallel ranks [1]")
    result.add_argument("--max-shard-size", help="with --to hf: of a safetensors file [5GB]")
    result.add_argument(
        "--tokenizer",
        type=local_path,
        help="with --to hf: SentencePiece model, tokenizer.json, a folder with one, or none [the one of the training]",
    )
    result.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="documents begin with the beginning-of-sequence token, and exported tokenizers add it [as the training's"
        " corpora, or as an imported tokenizer]",
    )
    result.add_argument(
        "--keep-padding",
        action="store_true",
        help="with --to hf: write the rows of the vocabulary that are padding [they are cut]",
    )
    result.add_argument(
        "--radius",
        choices=("stateless", "from-weights"),
        default="stateless",
        help="with --to hyperp: spheres of a later training, from shapes or from the norms of the weights [stateless]",
    )
    result.add_argument("--average", type=int, metavar="N", help="mean of the newest N checkpoints of ours; 2 or more")
    result.add_argument("--weights-only", action="store_true", help="leave out the optimizer's state")
    result.add_argument("--config", type=local_path, metavar="FILE", help="with --from archscale: YAML of the model")
    result.add_argument("--verify", action="store_true", help="compare all tensors, and logits where both models run")
    result.add_argument("--dry-run", action="store_true", help="say what would be done")
    return result


def main(argv: list[str]) -> None:
    """Convert as the flags say."""
    options = parser().parse_args(argv)
    job = Job(
        source=options.source,
        target=options.target,
        input=options.input,
        output=options.output,
        layout=Layout(options.tp, options.pp, options.ep),
        dtype=DTYPES[options.dtype] if options.dtype else None,
        shard_bytes=_bytes(options.max_shard_size) if options.max_shard_size else None,
        tokenizer=options.tokenizer,
        radius=options.radius,
        average=options.average,
        weights_only=options.weights_only,
        verify=options.verify,
        keep_padding=options.keep_padding,
        prepend_bos=options.prepend_bos,
        config=options.config,
    )
    convert(job, dry_run=options.dry_run)


def _bytes(text: str) -> int:
    """Read a size such as 5GB."""
    found = re.fullmatch(r"([0-9]{1,12})(KB|MB|GB)?", text)
    if not found or not int(found[1]):
        raise UsageError(f"--max-shard-size is {text}; write 5GB or 200MB, say")
    return int(found[1]) * _UNITS[found[2] or ""]


if __name__ == "__main__":
    run_command(main)
