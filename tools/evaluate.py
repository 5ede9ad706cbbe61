"""Loss and perplexity of a checkpoint of ours on a corpus (tools/preprocess_data.py), on one device, in fp32.

Documents are read one after the other, as in training, in windows of the model's length; each token but the first is
predicted once. --split takes a part of the documents, by the shares in the checkpoint's config. The padding of the
vocabulary takes part in the softmax, as in training. A model that no device holds is evaluated by its export to Hugging
Face (docs/checkpoints.md), where that padding is cut.
"""

import argparse
import json

from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.data import settings
from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.data.indexed import check_prefix, check_vocabulary
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.training.evaluation import evaluate, windows
from megatron_hyperp.training.inference import model_on_one_rank


def main(argv: list[str]) -> None:
    """Evaluate and print one line."""
    # It imports Megatron-Core, of which run_command has checked the version now.
    from megatron_hyperp.data.datasets import PARTS, documents_of

    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("checkpoint", type=local_path, help="folder of an iteration, or of several: then the newest")
    parser.add_argument(
        "--data-path", type=local_path, required=True, metavar="PREFIX", help="corpus: PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument("--split", choices=PARTS, help="documents of this part of the training's --split [all]")
    parser.add_argument("--tokens", type=positive_int, help="evaluate the first so many [all]")
    parser.add_argument("--micro-batch-size", type=positive_int, default=1, help="sequences at a time [1]")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    source = HyperPSource(options.checkpoint)
    info = check_prefix(options.data_path)
    check_vocabulary(options.data_path, source.config.model.vocab_size)
    _check_settings(options.data_path, prepend_bos=source.config.data.prepend_bos)
    which = range(info.num_sequences)
    if options.split:
        which = documents_of(source.config.data.split, options.split, info.num_sequences)
    held = int(info.sequence_lengths()[which.start : which.stop].sum(dtype="int64"))
    if held < 2:
        part = f"the {options.split} part ({source.config.data.split}) of " if options.split else ""
        raise UsageError(
            f"{part}{options.data_path} has {held} token(s), of which none can be predicted; give a longer corpus"
            + (", or leave out --split" if options.split else "")
        )
    sequences = windows(options.data_path, source.config.model.seq_length, options.tokens, which)
    with model_on_one_rank(source.config, source.read) as logits:
        result = evaluate(logits, sequences, options.micro_batch_size)
    if options.json:
        print(json.dumps({"loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens}))
    else:
        print(f"loss {result.loss:.4f}, perplexity {result.perplexity:.2f}, over {result.tokens:,} tokens")


def _check_settings(prefix: str, *, prepend_bos: bool) -> None:
    """Refuse a corpus whose documents are known to begin otherwise than those of the training."""
    found = settings.read(prefix)
    if found is not None and found.prepend_bos != prepend_bos:
        how = {True: "with", False: "without"}
        raise UsageError(
            f"documents of {prefix} begin {how[found.prepend_bos]} a beginning-of-sequence token, those of the training"
            f" {how[prepend_bos]} one; preprocess it again with --{'' if prepend_bos else 'no-'}prepend-bos"
        )


if __name__ == "__main__":
    run_command(main)
