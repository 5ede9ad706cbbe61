"""Continue text with a checkpoint of ours, on one device: greedily, or sampled.

The weights are converted to the classes of transformers (in a folder that goes away again), whose generation keeps keys
and values of earlier tokens.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from megatron_hyperp import device
from megatron_hyperp.convert import huggingface
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.source import DTYPES
from megatron_hyperp.convert.vocabulary import export_rows, unknown_ids
from megatron_hyperp.data.arguments import positive_int
from megatron_hyperp.data.tokenizer import Tokenizer, load_tokenizer
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path


def main(argv: list[str]) -> None:
    """Load, generate, print."""
    options = _parse(argv)
    source = HyperPSource(options.checkpoint)
    name = options.tokenizer or source.config.data.tokenizer_model
    if name is None:
        raise UsageError(f"the config of {source.folder} names no tokenizer; give one with --tokenizer")
    tokenizer = load_tokenizer(name)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    export_rows(source.config, tokenizer, keep_padding=True)
    text = tokenizer.encode(prompt)
    # As documents began in training: with the beginning-of-sequence token if the corpora had it, else after the end of
    # another document. A prompt without it has the ids that transformers gives it with the exported tokenizer.
    tokens = tokenizer.document_start(prepend_bos=source.config.data.prepend_bos) + text or [tokenizer.eod]
    longest = source.config.model.positions
    if len(tokens) + options.max_new_tokens > longest:
        raise UsageError(
            f"{len(tokens)} tokens of the prompt and --max-new-tokens {options.max_new_tokens} are more than the"
            f" {longest} that the model has positions for; give fewer"
        )
    for index, made in enumerate(generate(source, tokens, options, tokenizer)):
        if index:
            print("---")
        print(tokenizer.decode(text + made))


@torch.no_grad()
def generate(
    source: HyperPSource, tokens: list[int], options: argparse.Namespace, tokenizer: Tokenizer
) -> list[list[int]]:
    """Return the tokens of each continuation, up to the end of the document.

    Args:
        source: the model.
        tokens: of the prompt.
        options: of the command line.
        tokenizer: it names the token that ends a document; ids that it does not know are never taken.
    """
    end = tokenizer.eod
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        huggingface.write(
            folder,
            source,
            dtype=DTYPES[options.dtype],
            shard_bytes=2**40,
            tokenizer=None,
            advance=lambda _: None,
            keep_padding=True,
        )
        model = huggingface.load_transformers(folder, DTYPES[options.dtype])
    torch.manual_seed(options.seed)
    sampled = options.temperature > 0
    how = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p} if sampled else {}
    made = model.to(device.device()).generate(
        torch.tensor([tokens], device=device.device()),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.long, device=device.device()),
        max_new_tokens=options.max_new_tokens,
        do_sample=sampled,
        num_return_sequences=options.samples,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=unknown_ids(tokenizer, source.config.model.vocab_size) or None,
        **how,
    )
    return [_until(row, end) for row in made[:, len(tokens) :].tolist()]


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument("checkpoint", type=local_path, help="folder of an iteration, or of several: then the newest")
    parser.add_argument("--prompt", default="", help="text to continue; -: what is read from standard input [none]")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="[64]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; 1: as the model says [0]")
    parser.add_argument("--top-k", type=int, default=0, help="sample among so many tokens; 0: all [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest with this probability [1]")
    parser.add_argument("--samples", type=positive_int, default=1, help="continuations; several need a temperature [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights [fp32]")
    parser.add_argument("--tokenizer", type=local_path, help="file of the tokenizer [that of the training]")
    options = parser.parse_args(argv)
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.top_k < 0:
        raise UsageError(
            f"--temperature is {options.temperature:g}, --top-k {options.top_k}, --top-p {options.top_p:g}; the first"
            " two must be 0 or more, the last above 0 and at most 1"
        )
    if options.temperature == 0 and (options.samples > 1 or options.top_k or options.top_p < 1):
        raise UsageError("--samples, --top-k and --top-p do nothing when greedy; give --temperature 1, say")
    return options


if __name__ == "__main__":
    run_command(main)
