"""YAML files and flags: what they set, which one wins, and every refusal."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import tempfile
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_hyperp import arguments
from megatron_hyperp.arguments import from_dict, load_yaml, parse, section_types, to_yaml
from megatron_hyperp.config import Config, flag_name
from megatron_hyperp.errors import UsageError

ROOT = Path(__file__).parents[2]
FIELDS = [(section, item) for section, kind in section_types().items() for item in dataclasses.fields(kind)]
EVERY_FIELD = pytest.mark.parametrize(("section", "item"), FIELDS, ids=[item.name for _, item in FIELDS])


def other_value(section: str, item: dataclasses.Field[Any]) -> Any:
    """A value of the field's type that is not its default."""
    kind, _, choices = arguments._unwrap(typing.get_type_hints(section_types()[section])[item.name])
    if choices:
        return next(choice for choice in choices if choice != item.default)
    if kind is bool:
        return not item.default
    return {int: 2**53 + 1, float: 1.25e-7, str: "some/path 1", list: ["0.5", "a b", "0.5", "1e3"]}[kind]


def flags_for(item: dataclasses.Field[Any], value: Any) -> list[str]:
    flag = flag_name(item.name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, *(value if isinstance(value, list) else [str(value)])]


def changed(section: str, item: dataclasses.Field[Any]) -> Config:
    config = Config()
    setattr(getattr(config, section), item.name, other_value(section, item))
    return config


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Flags


def test_help_lists_flags_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], description="What it does.")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for words in ("What it does.", "--config FILE", "--debug", *(f"\n{section}:\n" for section in section_types())):
        assert words in shown
    for _, item in FIELDS:
        assert f"  {flag_name(item.name)}" in shown


@EVERY_FIELD
def test_every_flag_is_documented(section: str, item: dataclasses.Field[Any]) -> None:
    (action,) = [action for action in arguments.build_parser("")._actions if action.dest == item.name]
    assert flag_name(item.name) in action.option_strings
    assert item.metadata["help"] in str(action.help).replace("%%", "%")


@EVERY_FIELD
def test_every_flag_sets_its_field_and_no_other(section: str, item: dataclasses.Field[Any]) -> None:
    assert parse(flags_for(item, other_value(section, item)), description="") == changed(section, item)


def test_switches_are_set_and_unset() -> None:
    assert parse(["--bf16"], description="").training.bf16
    assert not parse(["--bf16", "--no-bf16"], description="").training.bf16
    assert not parse(["--no-qk-layernorm"], description="").model.qk_layernorm


def test_no_flags_are_the_defaults() -> None:
    assert parse([], description="") == Config()


def test_a_flag_beats_the_file(tmp_path: Path) -> None:
    text = "training: {train_iters: 5, seed: 6, bf16: true}\noptimizer: {lr: 0.1}\ndata: {data_path: [a, b]}"
    path = write(tmp_path, text)
    flags = "--train-iters 7 --no-bf16 --lr 0.2 --data-path c --num-layers 0"
    for argv in (["--config", str(path), *flags.split()], [*flags.split(), "--config", str(path)]):
        config = parse(argv, description="")
        assert (config.training.train_iters, config.training.seed, config.training.bf16) == (7, 6, False)
        assert (config.optimizer.lr, config.data.data_path) == (0.2, ["c"])
    assert parse(["--config", str(path)], description="") == load_yaml(path)


@pytest.mark.parametrize("between", [[], ["--config"]])
def test_a_later_file_beats_an_earlier_one_and_a_flag_all(between: list[str], tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("training: {train_iters: 5, seed: 6}\ntransfer: {base_depth: 2, eta0: 0.5}")
    (tmp_path / "base.yaml").write_text("transfer: {eta0: 0.25}\ntraining: {seed: 7}")
    files = [str(tmp_path / "model.yaml"), *between, str(tmp_path / "base.yaml")]
    config = parse(["--config", *files, "--seed", "8"], description="")
    assert (config.training.train_iters, config.training.seed) == (5, 8)
    assert (config.transfer.base_depth, config.transfer.eta0) == (2, 0.25)


def test_a_later_file_may_repeat_all_that_an_earlier_one_fixes(tmp_path: Path) -> None:
    path = write(tmp_path, to_yaml(parse(["--depth", "2", "--vocab-size", "64"], description="").resolve()))
    assert load_yaml(path, path) == load_yaml(path)


# YAML


@EVERY_FIELD
def test_every_field_survives_yaml(section: str, item: dataclasses.Field[Any], tmp_path: Path) -> None:
    config = changed(section, item)
    text = to_yaml(config)
    loaded = load_yaml(write(tmp_path, text))
    assert loaded == config
    assert to_yaml(loaded) == text


@pytest.mark.parametrize("text", ["", "# nothing", "model:\n", "model: {}\noptimizer: null\n"])
def test_what_is_left_out_keeps_its_default(text: str, tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, text)) == Config()


def test_numbers_may_be_written_as_yaml_does_not_read_them() -> None:
    content = {"optimizer": {"lr": "1e-3"}, "training": {"train_iters": 1e3, "seed": "2e1"}, "transfer": {"eta0": 1}}
    config = from_dict(content, source="test")
    assert (config.optimizer.lr, config.transfer.eta0) == (0.001, 1.0)
    assert (config.training.train_iters, config.training.seed) == (1000, 20)
    assert type(config.training.train_iters) is type(config.training.seed) is int
    assert type(config.transfer.eta0) is float
    exact = from_dict({"model": {"vocab_size": 2**53 + 1, "num_layers": "9007199254740993"}}, source="test").model
    assert exact.vocab_size == exact.num_layers == 2**53 + 1


def test_words_may_be_numbers_and_paths_a_string() -> None:
    data = from_dict({"data": {"data_path": [0.3, "a b", 0.7, 12], "split": 1}}, source="test").data
    assert (data.data_path, data.split) == (["0.3", "a b", "0.7", "12"], "1")
    assert from_dict({"data": {"data_path": "0.3 a 0.7 b"}}, source="test").data.data_path == ["0.3", "a", "0.7", "b"]


def test_a_file_is_read_as_utf8(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path, "logging: {run_dir: läufe}")).logging.run_dir == "läufe"


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_example_configs_load_and_resolve(path: Path) -> None:
    resolved = load_yaml(path).resolve(tokenizer_vocab_size=32000)
    assert from_dict(resolved.to_dict(), source="test").resolve() == resolved


# Refusals: where and what was given, then the way out

YAML_REFUSALS: list[tuple[str | bytes, str]] = [
    ("modle: {}", r"section modle is unknown; did you mean model\?"),
    ("lr: 1", "section lr is unknown; it belongs to section optimizer"),
    ("zzz: 1", "section zzz is unknown; known are model, moe, parallel, .*logging"),
    ("7: 1", "section 7 is unknown; known are"),
    ("model: {hiden_size: 1}", r"key model\.hiden_size is unknown; did you mean hidden_size\?"),
    ("training: {lr: 1}", r"key training\.lr is unknown; it belongs to section optimizer"),
    ("parallel: {zzz: 1}", r"key parallel\.zzz is unknown; known are tensor_model_parallel_size, "),
    ("[model]", r"config\.yaml holds \['model'\]; it must map names to values"),
    ("[]", r"config\.yaml holds \[\]; it must map"),
    ("false", r"config\.yaml holds False; it must map"),
    ("model: 7", "section model holds 7; it must map names to values"),
    ("training: {train_iters: true}", r"training\.train_iters is True; it must be an integer"),
    ("training: {train_iters: 1.5}", r"training\.train_iters is 1\.5; it must be an integer"),
    ("training: {train_iters: x}", r"training\.train_iters is 'x'; it must be an integer"),
    ("training: {train_iters: .inf}", r"training\.train_iters is inf; it must be an integer"),
    ("training: {train_iters: .nan}", r"training\.train_iters is nan; it must be an integer"),
    ("training: {eval_iters: null}", r"training\.eval_iters is None; it must be an integer"),
    ("training: {train_iters: 1" + 400 * "0" + "}", r"training\.train_iters is 10+\.\.\.0+; it must be an integer"),
    ("optimizer: {lr: x}", r"optimizer\.lr is 'x'; it must be a number"),
    ("optimizer: {lr: false}", r"optimizer\.lr is False; it must be a number"),
    ("optimizer: {lr: [1]}", r"optimizer\.lr is \[1\]; it must be a number"),
    ("training: {bf16: 1}", r"training\.bf16 is 1; it must be true or false"),
    ("training: {bf16: 'yes'}", r"training\.bf16 is 'yes'; it must be true or false"),
    ("data: {split: [9, 1]}", r"data\.split is \[9, 1\]; it must be a string"),
    ("data: {split: true}", r"data\.split is True; it must be a string"),
    ("data: {data_path: null}", r"data\.data_path is None; it must be a list of strings"),
    ("data: {data_path: {a: 1}}", r"data\.data_path is \{'a': 1\}; it must be a list of strings"),
    ("data: {data_path: [a, [b]]}", r"data\.data_path is .*; it must be a list of strings"),
    ("data: {data_path: 5}", r"data\.data_path is 5; it must be a list of strings"),
    (
        "optimizer: {optimizer: sgd}",
        r"optimizer\.optimizer is 'sgd'; allowed are hyperp, muonh, normuonh, muon, norm",
    ),
    ("optimizer: {ns_dtype: null}", r"optimizer\.ns_dtype is None; allowed are auto, "),
    ("model: {", r"config .*config\.yaml is not YAML: .*line 1"),
    ("a: b: c", r"config .*config\.yaml is not YAML: .*line 1"),
    (b"\xff\xfe\xff", r"config .*config\.yaml is not YAML: "),
]

SIZED = Path(tempfile.mkdtemp()) / "sized.yaml"
SIZED.write_text("model: {num_layers: 4, kv_channels: 16}")
DEEP = Path(tempfile.mkdtemp()) / "deep.yaml"
DEEP.write_text("model: {depth: 8}")
MIXED = Path(tempfile.mkdtemp()) / "mixed.yaml"
MIXED.write_text("moe: {num_experts: 8, moe_router_topk: 2}")

FLAG_REFUSALS = [
    ("--hiden-size 5", r"unrecognized arguments: --hiden-size 5; did you mean --hidden-size\? \(--help lists"),
    ("--hidden_size 5", r"did you mean --hidden-size\?"),
    ("--hiden-size=5", r"did you mean --hidden-size\?"),
    ("--no-bf17", r"did you mean --no-bf16\?"),
    ("--zzz", r"unrecognized arguments: --zzz \(--help lists the flags\)"),
    ("stray", r"unrecognized arguments: stray \(--help"),
    ("--train-it 5", r"did you mean --train-iters\?"),
    ("--lr", r"argument --lr: expected one argument \(--help"),
    ("--lr x", "--lr is 'x'; it must be a number"),
    ("--train-iters 1.5", "--train-iters is '1.5'; it must be an integer"),
    ("--train-iters nan", "--train-iters is 'nan'; it must be an integer"),
    ("--train-iters " + 5000 * "9", r"--train-iters is '9+\.\.\.9+'; it must be an integer below 2\^63"),
    ("--run-dir \0", r"--run-dir is '\\x00'; it must be a string \(UTF-8, without NUL\)"),
    ("--optimizer sgd", "--optimizer is 'sgd'; allowed are hyperp, muonh, normuonh, muon, norm"),
    ("--config absent.yaml", r"config absent\.yaml cannot be read: No such file or directory; check the path"),
    (
        f"--config {SIZED} --depth 8",
        r"--depth 8 changes nothing in .*sized\.yaml, which sets num_layers, kv_channels; take those out",
    ),
    (
        f"--config {MIXED} --moe-topk 8",
        r"--moe-topk 8 changes nothing in .*mixed\.yaml, which sets num_experts, moe_router_topk; take those out",
    ),
    (
        f"--config {MIXED} --moe-sparsity 8 --moe-router-topk 7",
        r"--moe-sparsity 8 changes nothing in .*, which sets num_experts; take those out",
    ),
    (f"--config {MIXED} --moe-shared-expert", r"--moe-shared-expert changes nothing in .*, which sets num_experts"),
    (f"--config {MIXED} --no-moe-shared-expert", r"--no-moe-shared-expert changes nothing in .*num_experts"),
    (
        f"--config {SIZED} {DEEP}",
        r"deep\.yaml: depth 8 changes nothing in .*sized\.yaml, which sets num_layers, kv_channels; take those out",
    ),
    ("--config .", r"config \. cannot be read: Is a directory; check the path"),
]


@pytest.mark.parametrize(("content", "message"), YAML_REFUSALS, ids=[message for _, message in YAML_REFUSALS])
def test_bad_files_are_refused(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_yaml(write(tmp_path, content))
    assert "config.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.same_on_all_ranks


@pytest.mark.parametrize(("flags", "message"), FLAG_REFUSALS, ids=[message for _, message in FLAG_REFUSALS])
def test_bad_flags_are_refused(flags: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(flags.split(), description="")
    assert "\n" not in str(caught.value)
    assert caught.value.same_on_all_ranks


def test_every_refusal_has_a_test(tmp_path: Path) -> None:
    def raised_at(read: Callable[..., Config], argument: Any, **options: str) -> int | None:
        with pytest.raises(UsageError) as caught:
            read(argument, **options)
        return traceback.extract_tb(caught.value.__traceback__)[-1].lineno

    reached = {raised_at(load_yaml, write(tmp_path, content)) for content, _ in YAML_REFUSALS}
    reached |= {raised_at(parse, flags.split(), description="") for flags, _ in FLAG_REFUSALS}
    nodes = ast.walk(ast.parse(inspect.getsource(arguments)))
    assert reached == {node.lineno for node in nodes if isinstance(node, ast.Raise)}
