"""Say what is in a checkpoint: model, run, every tensor with its norm and how far it is off its sphere; compare two."""

import argparse
import fnmatch
import json
from typing import Any

from megatron_hyperp import arguments, checksums
from megatron_hyperp.convert.hyperp import HyperPSource
from megatron_hyperp.convert.inspection import (
    Difference,
    Row,
    config_differences,
    differences,
    dtype_name,
    state_rows,
    weight_rows,
)
from megatron_hyperp.errors import UsageError, run_command
from megatron_hyperp.files import local_path
from megatron_hyperp.text import aligned
from megatron_hyperp.training.checkpointing import PARENT, RUN_ID
from megatron_hyperp.training.schedule import SCHEDULE, Schedule

EXIT_DIFFERENT = 1


def main(argv: list[str]) -> int:
    """Inspect one checkpoint, or compare two; return 1 if two differ, or one is damaged."""
    options = _parse(argv)
    if options.diff:
        return _compare(HyperPSource(options.diff[0]), HyperPSource(options.diff[1]), options)
    source = HyperPSource(options.checkpoint)
    if options.verify:
        return _verify(source)
    if options.config:
        print(arguments.to_yaml(source.config), end="")
        return 0
    rows = [row for row in weight_rows(source) if fnmatch.fnmatchcase(row.name, options.tensors)]
    if options.optimizer:
        rows += [row for row in state_rows(source) if fnmatch.fnmatchcase(row.name, options.tensors)]
    about = _about(source)
    if options.json:
        print(json.dumps({**about, "tensors": [_as_json(row) for row in rows]}, indent=1))
        return 0
    print("\n".join(aligned([(name, _told(value)) for name, value in about.items()])))
    print()
    table = [("tensor", "dtype", "shape", "norm", "rule", "radius", "norm / radius - 1"), *map(_cells, rows)]
    print("\n".join(aligned(table, right=lambda column: column in (3, 5, 6))))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="--debug shows the traceback of an error.")
    parser.add_argument(
        "checkpoint", nargs="?", type=local_path, help="folder of an iteration, or of several: then the newest"
    )
    parser.add_argument(
        "--diff", nargs=2, type=local_path, metavar=("A", "B"), help="compare two instead; exit code 1 if they differ"
    )
    parser.add_argument("--optimizer", action="store_true", help="the optimizer's state as well")
    parser.add_argument("--tensors", default="*", metavar="PATTERN", help="only names like this: *.layers.0.* [*]")
    parser.add_argument("--config", action="store_true", help="print the run's config instead, as YAML")
    parser.add_argument("--verify", action="store_true", help="compare checksums instead; exit code 1 if one differs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.diff is None):
        parser.error("give a checkpoint, or --diff with two")
    return options


def _verify(source: HyperPSource) -> int:
    """Say whether files are what they were when they were written; return the exit code."""
    try:
        sums, found = checksums.read(source.folder), checksums.faults(source.folder)
    except ValueError as error:
        sums, found = {}, [str(error)]
    if sums is None:
        raise UsageError(f"{source.folder} has no {checksums.FILE}: it was written before there were any, or elsewhere")
    for line in found:
        print(line)
    size = sum(each.size for each in sums.values())
    print(f"{source.folder}: {'damaged' if found else 'sound'}, {len(sums)} files of {size:,} bytes")
    return EXIT_DIFFERENT if found else 0


def _about(source: HyperPSource) -> dict[str, Any]:
    """What a checkpoint is as a whole."""
    config, common, model = source.config, source.reader.common, source.config.model
    files = [path for path in source.folder.iterdir() if path.is_file()]
    progress, parent = common.get("progress") or {}, common.get(PARENT)
    about: dict[str, Any] = {
        "checkpoint": str(source.folder),
        "bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "version": common.get("version"),
        "iteration": progress.get("iteration", 0),
        "iterations": config.training.train_iters,
        "samples": progress.get("consumed_samples", 0),
        "tokens": progress.get("consumed_tokens", 0),
        "layout": dict(zip(("PP", "TP", "DP", "VPP"), common.get("layout") or (), strict=False)),
        "run": config.logging.run_dir,
        "wandb run": common.get(RUN_ID),
        "parent": parent.get("checkpoint") if isinstance(parent, dict) else None,
        "optimizer": config.optimizer.optimizer if source.whole else "none: weights alone",
        "parameters": sum(_numel(shape.shape) for shape in source.parameters.values()),
        "layers": model.num_layers,
        "width": model.hidden_size,
        "FFN": model.ffn_hidden_size,
        "heads": f"{model.num_attention_heads} of {model.kv_channels} in {model.num_query_groups} groups",
        "vocabulary": model.vocab_size,
    }
    if SCHEDULE in common:
        about["samples of the run"] = Schedule.from_state(common[SCHEDULE], config).total.samples
    if config.moe.num_experts:
        moe = config.moe
        about["experts"] = f"{moe.moe_router_topk} of {moe.num_experts} of FFN {moe.moe_ffn_hidden_size}"
        about["shared expert"] = moe.moe_shared_expert_intermediate_size
    return about


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * _numel(shape[1:]) if shape else 1


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {size}" for name, size in value.items()) or "of no ranks: written by a tool"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape))
    radius = "" if row.radius is None else f"{row.radius:.6g}"
    deviation = "" if row.deviation is None else f"{row.deviation:.1e}"
    return row.name, dtype_name(row.dtype), shape, f"{row.norm:.6g}", row.rule, radius, deviation


def _as_json(row: Row) -> dict[str, Any]:
    names = ("name", "shape", "norm", "rule", "radius", "deviation")
    return {**{name: getattr(row, name) for name in names}, "dtype": dtype_name(row.dtype)}


def _compare(first: HyperPSource, second: HyperPSource, options: argparse.Namespace) -> int:
    """Print how two checkpoints differ; return the exit code."""
    settings = config_differences(first.config, second.config)
    alike, found = 0, []
    for difference in differences(first, second, states=options.optimizer):
        if difference is None:
            alike += 1
        elif fnmatch.fnmatchcase(difference.name, options.tensors):
            found.append(difference)
    if options.json:
        content = {
            "settings": [{"name": name, "values": [str(one), str(other)]} for name, one, other in settings],
            "alike": alike,
            "tensors": [{name: getattr(each, name) for name in Difference.__slots__} for each in found],
        }
        print(json.dumps(content, indent=1))
        return EXIT_DIFFERENT if found else 0
    for name, one, other in settings:
        print(f"{name}: {one} and {other}")
    if found:
        table = [("tensor", "largest |a - b|", "|a - b| / |a|"), *map(_difference_cells, found)]
        print("\n".join(aligned(table, right=lambda column: column > 0)))
    print(f"{alike} tensors are alike to the bit, {len(found)} are not")
    return EXIT_DIFFERENT if found else 0


def _difference_cells(each: Difference) -> tuple[str, str, str]:
    if each.reason:
        return f"{each.name}: {each.reason}", "", ""
    return each.name, f"{each.largest:.3g}", f"{each.relative:.3g}"


if __name__ == "__main__":
    run_command(main)
