"""Every refusal of a config: the flag it names and the way out."""

from __future__ import annotations

import ast
import inspect
import re
import traceback
from typing import NamedTuple

import pytest

from megatron_hyperp import arguments, learning_rates, precision, role_laws
from megatron_hyperp import resolve as resolve_module
from megatron_hyperp.errors import UsageError
from tests.unit.test_config import PAPER, SMALL, resolve


class Refusal(NamedTuple):
    """Flags that cannot run, and what the message says: the flags it names, then the way out."""

    flags: str
    names: str
    mends: str
    options: dict[str, int] | None = None


TP2, PP2 = "--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2"
TWO = {"world_size": 2}
TP2SP = f"{TP2} --sequence-parallel"
EXPERTS = f"{SMALL} --num-experts 4"
WITHOUT_VOCABULARY = SMALL.replace(" --vocab-size 64", "")

REFUSALS = [
    # Ranges
    Refusal(f"{SMALL} --lr 0", "--lr is 0", "greater than 0"),
    Refusal(f"{SMALL} --lr=-1", "--lr is -1", "greater than 0"),
    Refusal(f"{SMALL} --lr nan", "--lr is nan", "a finite number greater than 0"),
    Refusal(f"{SMALL} --train-tokens inf", "--train-tokens is inf", "a finite number greater than 0"),
    Refusal(f"{SMALL} --depth 0", "--depth is 0", "greater than 0"),
    Refusal(f"{SMALL} --micro-batch-size 0", "--micro-batch-size is 0", "greater than 0"),
    Refusal(f"{SMALL} --weight-decay=-0.1", "--weight-decay is -0.1", "at least 0"),
    Refusal(f"{SMALL} --hidden-size -64", "--hidden-size is -64", "greater than 0$"),
    Refusal(f"{SMALL} --hidden-size 0", "--hidden-size is 0", "greater than 0, or left out to be derived$"),
    Refusal(f"{SMALL} --muon-momentum 1", "--muon-momentum is 1", "at least 0 and below 1"),
    Refusal(f"{SMALL} --adam-beta1 1.5", "--adam-beta1 is 1.5", "at least 0 and below 1"),
    Refusal(f"{SMALL} --adam-beta2=-0.5", "--adam-beta2 is -0.5", "at least 0 and below 1"),
    Refusal(f"{SMALL} --seed 4294967296", "--seed is 4.29", r"from 0 to 2\^32 - 1"),
    # Data
    Refusal(
        f"{SMALL} --data-path 0.5 data/a 0.5 s3://bucket/b",
        "--data-path s3://bucket/b is an address, not a path",
        "copy it with `aws s3 sync`, or mount the bucket with mount-s3, and give its path$",
    ),
    Refusal(f"{SMALL} --mock-data --data-path a b", "--mock-data .*--data-path is a b", "leave one of them out$"),
    # Architecture
    Refusal("--hidden-size 64", "--num-layers", "or --depth"),
    Refusal("--num-layers 4", "--hidden-size", "or --depth"),
    Refusal("--num-layers 4 --hidden-size 64", "--num-attention-heads", "or --depth"),
    Refusal(
        f"{SMALL} --hidden-size 66",
        "--hidden-size 66 .*--num-attention-heads 4",
        r"64 and 68 \(or give --kv-channels\)",
    ),
    Refusal(f"{SMALL} --num-query-groups 3", "--num-query-groups 3 .*--num-attention-heads 4", "that do: 1, 2, 4$"),
    Refusal(f"{SMALL} --kv-channels 15", "--kv-channels is 15", "even head size, 16, say"),
    Refusal(f"{SMALL} --hidden-size 12", "--kv-channels is 3", "even head size, 4, say"),
    Refusal(WITHOUT_VOCABULARY, "vocabulary is not known", "give --tokenizer-model or --vocab-size"),
    Refusal(SMALL, "65 tokens, more than --vocab-size 64", "raise it, or leave it out", {"tokenizer_vocab_size": 65}),
    Refusal(
        f"{SMALL} --unpadded-vocab-size 65",
        "--unpadded-vocab-size 65 is more than --vocab-size 64",
        "lower it, or leave it out",
    ),
    Refusal(
        f"{SMALL} --max-position-embeddings 8",
        "--max-position-embeddings 8 is less than --seq-length 16",
        "raise it, or leave it out",
    ),
    # Layout
    Refusal(
        f"{SMALL} {TP2}",
        r"3 rank\(s\) cannot hold .* 2 x 1 = 2;",
        "a multiple of 2 ranks, or lower --tensor-model-parallel-size",
        {"world_size": 3},
    ),
    Refusal(
        f"{SMALL} {TP2} {PP2}",
        r"6 rank\(s\) cannot hold .* 2 x 2 = 4;",
        "a multiple of 4 ranks, or lower .* or --pipeline-model-parallel-size",
        {"world_size": 6},
    ),
    Refusal(
        f"{SMALL} --tensor-model-parallel-size 8",
        "--tensor-model-parallel-size 8 does not divide --num-attention-heads 4",
        "fit this model: 1, 2$",
        {"world_size": 8},
    ),
    Refusal(
        f"{SMALL} --tensor-model-parallel-size 4",
        "--tensor-model-parallel-size 4 does not divide --num-query-groups 2",
        "fit this model: 1, 2$",
        {"world_size": 4},
    ),
    Refusal(f"{SMALL} {TP2} --ffn-hidden-size 99", f"{TP2} .*--ffn-hidden-size 99", "fit this model: 1$", TWO),
    Refusal(f"{SMALL} {TP2} --vocab-size 65", f"{TP2} .*--vocab-size 65", "fit this model: 1$", TWO),
    Refusal(
        f"{SMALL} --sequence-parallel", "--sequence-parallel", "--tensor-model-parallel-size above 1; leave it out"
    ),
    Refusal(
        f"{SMALL} {TP2} --sequence-parallel --seq-length 15",
        f"--sequence-parallel .*--seq-length .*{TP2} divides, not 15",
        "the nearest: 14 and 16$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --num-virtual-stages-per-pipeline-rank 2",
        "--num-virtual-stages-per-pipeline-rank 2 needs --pipeline-model-parallel-size above 1",
        "leave it out, or raise that",
    ),
    Refusal(f"{SMALL} {PP2} --num-layers 5", "--num-layers 5 .*--pipeline-model-parallel-size", "4 and 6$", TWO),
    Refusal(f"--depth 3 --vocab-size 64 {PP2}", "--depth 3 .*--pipeline-model-parallel-size", "2 and 4$", TWO),
    Refusal(
        f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 3",
        "--num-layers 4 .*--pipeline-model-parallel-size x --num-virtual-stages-per-pipeline-rank = 6",
        "the nearest that are: 6$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --recompute-granularity full --recompute-num-layers 3",
        "--recompute-num-layers 3 .*4 layers",
        "1, 2, 4$",
    ),
    Refusal(
        f"{SMALL} {PP2} --recompute-granularity full --recompute-method block --recompute-num-layers 3",
        "--recompute-num-layers 3",
        "give 2 at most",
        TWO,
    ),
    # Experts
    Refusal(f"{SMALL} --moe-sparsity=-1", "--moe-sparsity is -1", "greater than 0"),
    Refusal(f"{EXPERTS} --moe-expert-capacity-factor 0", "--moe-expert-capacity-factor is 0", "greater than 0"),
    Refusal(f"{SMALL} --moe-sparsity 4", "--moe-sparsity needs --moe-topk", "together they make S x K experts"),
    Refusal(f"{SMALL} --moe-topk 4", "--moe-topk needs --moe-sparsity", "together they make S x K experts"),
    Refusal(
        f"{SMALL} --moe-sparsity 4 --moe-topk 2 --num-experts 0",
        "--num-experts 0 makes a dense model, but --moe-sparsity 4 and --moe-topk 2",
        "leave the first out, or the other two$",
    ),
    Refusal(f"{EXPERTS} --moe-ffn-hidden-size 0", "--moe-ffn-hidden-size is 0", "give 1 or more, or leave it out$"),
    Refusal(
        f"{SMALL} --moe-sparsity 4 --moe-topk 1 --moe-shared-expert",
        "--moe-shared-expert leaves none of --moe-topk 1",
        "give 2 or more, or leave it out",
    ),
    Refusal(
        f"{SMALL} --moe-sparsity 4 --moe-topk 7",
        "--moe-topk 7 does not divide the FFN size 256",
        "the nearest --ffn-hidden-size: 252 and 259$",
    ),
    Refusal(
        f"{EXPERTS} --moe-router-topk 5",
        "--moe-router-topk 5 is more than the 4 routed experts",
        "give 4 at most",
    ),
    Refusal(
        f"{SMALL} --moe-sparsity 1 --moe-topk 4 --num-experts 3",
        "--moe-router-topk 4 is more than the 3 routed experts",
        "give 3 at most",
    ),
    *(
        Refusal(f"{SMALL} {flag}", f"{flag.split()[0]} .*needs experts", "--num-experts, or .* or leave it out$")
        for flag in (
            "--moe-shared-expert",
            "--moe-router-topk 2",
            "--moe-ffn-hidden-size 64",
            "--moe-shared-expert-intermediate-size 64",
            "--moe-z-loss-coeff 1e-3",
            "--moe-expert-capacity-factor 1.5",
            "--moe-balance-statistics exact",
        )
    ),
    Refusal(
        f"{EXPERTS} --moe-balance-statistics exact --moe-router-load-balancing-type aux_loss",
        "--moe-balance-statistics exact needs .*--moe-router-load-balancing-type is aux_loss",
        "leave it out, or give global and a weight above 0$",
    ),
    Refusal(
        f"{EXPERTS} --moe-balance-statistics exact --moe-aux-loss-coeff 0",
        "--moe-balance-statistics exact needs .*--moe-aux-loss-coeff 0",
        "leave it out, or give global and a weight above 0$",
    ),
    Refusal(f"{SMALL} --expert-model-parallel-size 2", "--expert-model-parallel-size 2 needs experts", "--num-experts"),
    Refusal(
        f"{SMALL} --expert-tensor-parallel-size 2 {TP2}",
        "--expert-tensor-parallel-size 2 needs experts",
        "leave it out, or give --num-experts",
        TWO,
    ),
    Refusal(
        f"{SMALL} --expert-model-parallel-size 2 --expert-tensor-parallel-size 4",
        "--expert-model-parallel-size 2 needs experts",
        "leave it out, or give --num-experts",
        {"world_size": 8},
    ),
    Refusal(f"{EXPERTS} {TP2}", f"experts under {TP2} need --sequence-parallel", "give it", TWO),
    Refusal(
        f"{PAPER} --moe-sparsity 8 --moe-topk 8 --moe-shared-expert --expert-model-parallel-size 8",
        "--expert-model-parallel-size 8 does not divide the 63 routed experts",
        "those that do: 1, 3, 7, 9, 21, 63; the nearest --num-experts that it divides: 56 and 64$",
        {"world_size": 8},
    ),
    Refusal(
        f"{EXPERTS} --expert-tensor-parallel-size 2",
        "--expert-tensor-parallel-size is 2; it must be 1, or --tensor-model-parallel-size",
        "which is 1$",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 4",
        "--expert-tensor-parallel-size is 4; it must be 1, or --tensor-model-parallel-size",
        "which is 2$",
        {"world_size": 4},
    ),
    Refusal(
        f"{EXPERTS} {TP2SP} --expert-tensor-parallel-size 2 --moe-ffn-hidden-size 33",
        "--expert-tensor-parallel-size 2 does not divide --moe-ffn-hidden-size 33",
        "the nearest: 32 and 34$",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} --moe-ffn-hidden-size 34",
        "--moe-ffn-hidden-size / --expert-tensor-parallel-size is 34; experts are multiplied in groups",
        "a multiple of 4; the nearest: 32 and 36$",
    ),
    Refusal(
        f"{EXPERTS} --bf16 --hidden-size 68 --kv-channels 16",
        "--hidden-size is 68; experts are multiplied in groups",
        "a multiple of 8; the nearest: 64 and 72$",
    ),
    Refusal(f"{SMALL} --fp8-emulation", "--fp8-emulation needs --fp8-format", "give hybrid or e4m3, or leave it out$"),
    # Radii of an import
    Refusal(
        f"{SMALL} --radius from-weights --radius-scale 2",
        "--radius-scale is a factor on radii from shapes",
        "leave one of them out",
    ),
    Refusal(
        f"{SMALL} --radius from-weights --matrix-split head",
        "--matrix-split makes matrices of which none were measured",
        "leave one",
    ),
    Refusal(f"{SMALL} --radius from-weights --optimizer muon", "--optimizer muon has no spheres", "leave one"),
    Refusal(
        f"{SMALL} --radius from-weights --fp8-format e4m3 --fp8-emulation --fp8-weight-scale sphere",
        "--fp8-weight-scale sphere takes radii from shapes",
        "leave one",
    ),
    Refusal(f"{SMALL} --no-qk-layernorm --qk-norm-lr-mult 0", "--qk-norm-lr-mult is of gains that", "leave one"),
    # Update rules
    Refusal(
        f"{SMALL} --router-rule adamw", "--router-rule adamw needs experts", "give --num-experts, or leave it out$"
    ),
    # Learning rates of roles
    Refusal(
        f"{SMALL} --router-lr-mult 0.5", "--router-lr-mult 0.5 needs experts", "give --num-experts, or leave it out$"
    ),
    Refusal(f"{SMALL} --lr-exponents router:width=-1", "--lr-exponents router: needs experts", "leave it out$"),
    Refusal(
        f"{SMALL} --no-untie-embeddings-and-output-weights --output-lr-mult 1",
        "--output-lr-mult 1 is of an output layer that --no-untie-embeddings-and-output-weights leaves out",
        "leave one of them out$",
    ),
    Refusal(f"{SMALL} --embedding-lr-mult=-1", "--embedding-lr-mult is -1", "at least 0"),
    Refusal(f"{SMALL} --lr-exponents width=1", "--lr-exponents width=1", "give ROLE:AXIS=EXPONENT.*roles are hidden,"),
    Refusal(f"{SMALL} --lr-exponents vector:heads=1", "--lr-exponents vector:heads=1", "axes are width, depth, tokens"),
    Refusal(f"{SMALL} --lr-exponents vector:width=1,width=2", "--lr-exponents vector:width", "already; give one$"),
    Refusal(f"{SMALL} --lr-exponents vector:width=inf", "--lr-exponents vector:width=inf", "finite number, such as"),
    Refusal(
        f"{SMALL} --lr-exponents vector:width=400", "rate of the gains and biases would be 0", "look at its factor"
    ),
    Refusal(f"{SMALL} --lr-exponents vector:width=-400", "no computer holds", "powers of ten"),
    Refusal(
        f"{SMALL} --lr-exponents vector:width=-255 --adam-lr-mult 1e20", "gains .* would be inf", "--lr-exponents$"
    ),
    Refusal(
        f"{SMALL} --lr-preset marin-2608 --optimizer adamw",
        "--lr-preset marin-2608 is the law of MuonH, which --optimizer adamw is not",
        "give hyperp or muonh, or --lr-preset paper$",
    ),
    Refusal(
        f"{SMALL} --lr-preset marin-2608 --token-exponent 0.5",
        "--token-exponent 0.5 is of the paper's law, but --lr-preset marin-2608 has 0.346",
        "leave one of them out$",
    ),
    # FP8
    Refusal(f"{SMALL} --fp8-param-gather --bf16", "--fp8-param-gather needs --fp8-format", "leave it out$"),
    Refusal(
        f"{SMALL} --fp8-param-gather --bf16 --fp8-format e4m3 --fp8-emulation --fp8-recipe rowwise",
        "--fp8-param-gather takes one scale a weight, which --fp8-recipe rowwise has not",
        "give tensorwise, or leave it out$",
    ),
    Refusal(
        f"{SMALL} --fp8-param-gather --fp8-format e4m3 --fp8-emulation",
        "--fp8-param-gather rounds weights that are in bf16 alone",
        "give --bf16, or leave it out$",
    ),
    Refusal(f"{SMALL} --fp8-weight-scale sphere", "--fp8-weight-scale sphere needs --fp8-format", "leave it out$"),
    Refusal(
        f"{SMALL} --num-layers-at-start-in-bf16 1", "--num-layers-at-start-in-bf16 needs --fp8-format", "leave it out$"
    ),
    Refusal(
        f"{SMALL} --num-layers-at-end-in-bf16 1", "--num-layers-at-end-in-bf16 needs --fp8-format", "leave it out$"
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --num-layers-at-start-in-bf16 90 --num-layers-at-end-in-bf16 1",
        "--num-layers-at-start-in-bf16 90 and --num-layers-at-end-in-bf16 1 leave none of the",
        "lower them, or leave out --fp8-format$",
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max",
        "--fp8-amax-history-len needs --fp8-format and --fp8-recipe delayed",
        "give both, or leave it out$",
    ),
    Refusal(f"{SMALL} --fp8-amax-compute-algo max", "max needs --fp8-format and --fp8-recipe", "leave it out$"),
    Refusal(f"{SMALL} --fp8-margin 1", "--fp8-margin needs --fp8-format and --fp8-recipe delayed", "leave it out$"),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 4",
        "--fp8-amax-history-len 4 keeps steps that --fp8-amax-compute-algo most_recent does not look at",
        "give max, or leave the length out$",
    ),
    Refusal(
        f"{SMALL} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-compute-algo max",
        "--fp8-amax-compute-algo max needs --fp8-amax-history-len above 1",
        "give a length, 1024 say",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --transformer-impl transformer_engine",
        "--fp8-emulation is of Megatron-Core's local layers, not of --transformer-impl transformer_engine",
        "leave one of them out$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --transformer-impl local",
        "--transformer-impl local has no FP8 but in emulation",
        "give --fp8-emulation$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-recipe delayed --num-layers-at-end-in-bf16 1",
        "--fp8-recipe delayed takes every layer to FP8 or none",
        "give --fp8-recipe tensorwise$",
    ),
    Refusal(
        f"{SMALL} --num-layers 4 {PP2} --fp8-format e4m3 --num-layers-at-start-in-bf16 3",
        "--num-layers-at-start-in-bf16 3 and --num-layers-at-end-in-bf16 0 can each be 2 at most",
        "lower them$",
        TWO,
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-recipe blockwise",
        "--hidden-size is [0-9]+, but --fp8-recipe blockwise needs multiples of 128",
        "the nearest: 128$",
    ),
    Refusal(f"{SMALL} --fp8-format e4m3 --fp8-recipe rowwise", "rowwise needs --fp8-emulation", "no such recipe$"),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-weight-scale sphere", "sphere needs --fp8-emulation", "no static scales$"
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --fp8-recipe mxfp8 --fp8-weight-scale sphere",
        "one scale a matrix, which --fp8-recipe mxfp8 has not",
        "give tensorwise$",
    ),
    Refusal(
        f"{SMALL} --fp8-format e4m3 --fp8-emulation --fp8-weight-scale sphere --optimizer muon",
        "needs weights on spheres, which --optimizer muon leaves",
        "give hyperp, muonh or normuonh$",
    ),
    Refusal(
        f"{SMALL} --attention-backend sdpa --recompute-granularity selective",
        "--recompute-granularity selective recomputes what --attention-backend sdpa does not keep",
        "leave it out, or give full$",
    ),
    Refusal(
        f"{SMALL} --deterministic-mode --bf16 --cross-entropy-loss-fusion",
        "--cross-entropy-loss-fusion is not deterministic",
        "leave it out, or --deterministic-mode$",
    ),
    Refusal(
        f"{SMALL} --cross-entropy-fusion-impl te",
        "--cross-entropy-fusion-impl te needs --cross-entropy-loss-fusion",
        "give it, or leave it out$",
    ),
    Refusal(
        f"{SMALL} --cross-entropy-loss-fusion",
        "--cross-entropy-loss-fusion rounds gradients to bf16",
        "give --bf16, or te, or leave it out$",
    ),
    Refusal(
        f"{SMALL} --gradient-accumulation-fusion --fp8-format hybrid --fp8-emulation",
        "--gradient-accumulation-fusion .*--fp8-emulation",
        "leave one out$",
    ),
    Refusal(
        f"{EXPERTS} {PP2} --expert-model-parallel-size 4",
        r"2 rank\(s\) cannot hold expert x expert-tensor x pipeline parallelism 4 x 1 x 2",
        "a multiple of 8 ranks, or lower --expert-model-parallel-size",
        TWO,
    ),
    Refusal(
        f"{EXPERTS} {TP2SP} --moe-shared-expert-intermediate-size 33",
        f"{TP2} does not divide --moe-shared-expert-intermediate-size 33",
        "the nearest: 32 and 34$",
        TWO,
    ),
    # Batch
    Refusal(f"{SMALL} --micro-batch-size 3", "--global-batch-size 8 .*--micro-batch-size", "that are: 6 and 9$"),
    Refusal(f"{SMALL} --micro-batch-size 16", "--global-batch-size 8 .*--micro-batch-size .*16", "that are: 16$"),
    Refusal(f"{SMALL}", "--global-batch-size 8 .*data-parallel ranks = 3", "that are: 6 and 9$", {"world_size": 3}),
    Refusal(
        f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 9",
        f"--global-batch-size 9 makes 9 micro-batches.* {PP2}",
        "the nearest: 8 and 10$",
        TWO,
    ),
    # Duration and schedule
    Refusal(
        f"{SMALL} --train-tokens 1000",
        "--train-iters 20 and --train-tokens 1000 contradict",
        "the tokens take 8 iterations; give one",
    ),
    Refusal(SMALL.replace(" --train-iters 20", ""), "how long", "give --train-iters or --train-tokens"),
    Refusal(f"{SMALL} --lr 0.1 --min-lr 0.2", "--min-lr 0.2 .*rate 0.1", "lower it"),
    # Numbers that no float holds
    Refusal(f"{SMALL} --depth 100001", "--depth is 100001", "100,000 at most"),
    Refusal(f"{SMALL} --base-tokens 1e300 --token-exponent 9", "no computer holds", "powers of ten"),
    Refusal(f"{SMALL} --eta0 1e308 --base-tokens 1e12", "learning rate .* inf", "give --lr, or look"),
    Refusal(f"{SMALL} --ns-form gram --ns-dtype bf16", "--ns-form gram .*bf16", "give fp16 or fp32"),
    Refusal(f"{SMALL} --ns-strategy gram --ns-form standard", "--ns-strategy gram .*standard", "leave one out"),
    Refusal(
        f"{SMALL} --ns-steps experts=3",
        "--ns-steps experts=3 is of matrices that this model does not have",
        "it has attention, mlp$",
    ),
    Refusal(f"{SMALL} --ns-strategy gram --ns-dtype bf16", "--ns-strategy gram .*bf16", "give fp16 or fp32"),
    Refusal(f"{SMALL} --lr-warmup-iters 20", "--lr-warmup-iters 20 .*20 iterations", "give 19 at most"),
    Refusal(
        f"{SMALL} --lr-decay-style WSD --lr-warmup-iters 15 --lr-wsd-decay-iters 6",
        "--lr-wsd-decay-iters 6",
        "give 5 at most",
    ),
]


def refused(refusal: Refusal, match: str | None = None) -> UsageError:
    with pytest.raises(UsageError, match=match) as caught:
        resolve(refusal.flags, **(refusal.options or {}))
    return caught.value


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.names)
def test_what_cannot_run_is_refused(refusal: Refusal) -> None:
    error = refused(refusal, match=f"{refusal.names}.*{refusal.mends}")
    assert error.same_on_all_ranks
    assert "\n" not in str(error)
    known = arguments.build_parser("")._option_string_actions
    assert set(re.findall(r"--[a-z][a-z0-9-]*", str(error))) <= set(known)


def test_every_refusal_has_a_test() -> None:
    frames = [traceback.extract_tb(refused(refusal).__traceback__)[-1] for refusal in REFUSALS]
    reached = {(frame.filename, frame.lineno) for frame in frames}
    for module in (resolve_module, precision, learning_rates, role_laws):
        nodes = ast.walk(ast.parse(inspect.getsource(module)))
        raised = {(module.__file__, node.lineno) for node in nodes if isinstance(node, ast.Raise) and node.exc}
        assert raised <= reached
        reached -= raised
    assert not reached


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        (f"{SMALL} {TP2} --sequence-parallel", 2),
        (f"{SMALL} {PP2} --num-virtual-stages-per-pipeline-rank 2", 4),
        (f"{SMALL} --recompute-granularity full --recompute-method block --recompute-num-layers 3", 1),
        (f"{SMALL} --recompute-granularity selective --recompute-num-layers 3", 1),
        (f"{SMALL} --lr-warmup-iters 19 --lr 0.1 --min-lr 0.1", 1),
        (f"{SMALL} --lr-decay-style WSD --lr-warmup-iters 15 --lr-wsd-decay-iters 5", 1),
        (f"{SMALL} --muon-momentum 0 --adam-beta1 0 --weight-decay 0 --clip-grad 0", 8),
        (f"{SMALL} --attention-backend sdpa --recompute-granularity full", 1),
        (f"{SMALL} --cross-entropy-loss-fusion --bf16", 1),
        (f"{SMALL} --cross-entropy-loss-fusion --cross-entropy-fusion-impl te", 1),
        (f"{SMALL} --no-gradient-accumulation-fusion --fp8-format hybrid --fp8-emulation", 1),
        # Harmless without experts: one command line serves dense models and mixtures.
        (f"{SMALL} --moe-gate softmax --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type none", 1),
        (f"{SMALL} --moe-token-dispatcher-type allgather", 1),
        (f"{SMALL} --moe-sparsity 4 --moe-topk 1", 1),
        (f"{SMALL} --moe-sparsity 1 --moe-topk 2 --moe-shared-expert", 1),
        (f"{EXPERTS} --moe-router-topk 4 --moe-balance-statistics exact --moe-z-loss-coeff 1e-3", 1),
        (f"{EXPERTS} {TP2SP} --expert-tensor-parallel-size 2 --expert-model-parallel-size 2", 4),
        # Expert parallelism may reach over tensor-parallel ranks.
        (f"{EXPERTS} {TP2SP} --expert-model-parallel-size 4", 4),
    ],
)
def test_what_can_run_is_not_refused(flags: str, world_size: int) -> None:
    resolve(flags, world_size=world_size)
