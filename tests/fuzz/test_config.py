"""Config files, structured values, and flags: a config, or one line that says what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from examples import pretrain_gpt
from megatron_hyperp import arguments, yaml_files
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.scaling.spec import Spec
from tests.fuzz.profiles import fuzzed, run
from tests.fuzz.strategies import TEXT, VALUES, changed, damaged
from tests.toy import toy_config

VALID: dict[str, Any] = toy_config("prefix", Path("run")).to_dict()
YAML = arguments.to_yaml(toy_config("prefix", Path("run"))).encode()
SECTIONS = arguments.section_types()
NAMES = [(section, name) for section, kind in SECTIONS.items() for name in kind.__annotations__]
# Ten lines that stand for 10^9 values: named, merged, and in themselves.
LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 10))
TAGS = [
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "binary",
    "omap",
    "pairs",
    "set",
    "seq",
    "map",
    "python/name:os.system",
]


def resolved(content: Any, world_size: int = 1) -> Config:
    return arguments.from_dict(content, source="here").resolve(world_size=world_size, tokenizer_vocab_size=64)


@fuzzed(100)
@given(st.one_of(damaged(YAML), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(LAUGHS.encode())
@example(("model:\n  depth: *a9\n" + LAUGHS).encode())
@example((LAUGHS + "model: {depth: *a9}\n").encode())
@example(MERGES.encode())
@example(b"model: &a {depth: *a}")
@example(b"model: &a [*a]")
@example(b"[" * 3000)
@example(b"{" * 3000)
@example(b'a: !!int ""')
@example(b"a: !!float ''")
@example(b"a: !!bool x")
@example(b"a: !!timestamp x")
@example(b"a: 2001-99-99")
@example(b"a: !!python/object/apply:os.system [true]")
@example(b'logging: {run_dir: "a\\0b"}')
@example(b"? [a]\n: b")
@example(b"?")
@example(b"1" * 5000)
@example(b"a: 1:" + b"59:" * 3000 + b"1")
def test_yaml(tmp_path_factory: Any, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(content)
    config = run("config, YAML text", arguments.load_yaml, path, refusals=(UsageError,))
    if config is not None:
        run("config, resolved", config.resolve, refusals=(UsageError,))
    run("sweep, YAML text", Spec.read, path, refusals=(UsageError,))


@fuzzed(100)
@given(st.sampled_from(TAGS), TEXT.filter(str.isprintable))
def test_tags(tag: str, text: str) -> None:
    content = f"a: !!{tag} {yaml.safe_dump(text)}"
    run("YAML tags", yaml_files.load, content, refusals=(ValueError,))


@fuzzed(150)
@given(st.one_of(changed(VALID), VALUES), st.sampled_from([1, 2, 3, 8, 2**20]))
@example({"model": {"depth": 10**18}}, 1)
@example({"model": {"num_layers": 2**62, "hidden_size": 6, "num_attention_heads": 4}}, 1)
@example({"model": {"depth": 2, "num_query_groups": 10**17 + 1, "num_attention_heads": 10**17}}, 1)
@example({"model": {"depth": 2}, "transfer": {"base_tokens": 5e-324}}, 1)
@example({"model": {"depth": 2}, "transfer": {"token_exponent": 1e300, "base_tokens": 1e300}}, 1)
@example({"model": {"depth": 2}, "training": {"train_tokens": 5e-324}}, 1)
@example({"model": {"depth": 2}, "transfer": {"eta0": 1e308, "base_batch_tokens": 1}}, 1)
def test_values(content: Any, world_size: int) -> None:
    config = run("config, values", resolved, content, world_size, refusals=(UsageError,))
    if config is not None:
        assert arguments.from_dict(yaml.safe_load(arguments.to_yaml(config)), source="written") == config


@fuzzed(150)
@given(st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4))
def test_few_settings(settings: list[tuple[tuple[str, str], Any]]) -> None:
    content: dict[str, dict[str, Any]] = {"model": {"depth": 2}}
    for (section, name), value in settings:
        content.setdefault(section, {})[name] = value
    run("config, a few values", resolved, content, refusals=(UsageError,))


PARSER = pretrain_gpt.parser()
OPTIONS = sorted(
    option for action in PARSER._actions for option in action.option_strings if option not in ("-h", "--help")
)


def flagged(argv: list[str]) -> None:
    options = vars(PARSER.parse_args(argv))
    config = arguments.from_flags(options)
    size = options.get("world_size", 1)
    config.resolve(world_size=size if size > 0 else 1, tokenizer_vocab_size=64)


WORDS = st.one_of(
    st.sampled_from(OPTIONS), TEXT, st.sampled_from(["--config", "--", "-1", "1", "2", "64", "1e3", "none"])
)
PAIRS = st.tuples(st.sampled_from(OPTIONS), TEXT).map(list)


@fuzzed(150)
@given(
    st.one_of(st.lists(WORDS, max_size=6), st.lists(PAIRS, max_size=4).map(lambda pairs: sum(pairs, ["--depth", "2"])))
)
@example(["--depth", "2", "--num-query-groups", "1" * 400])
@example(["--config", "a\0b"])
@example(["--config", "/dev/zero"])
@example(["--depth", "²"])
@example(["--run-dir", "\udc80", "--depth", "2"])
@example(["--depth", "2", "--train-iters", "9" * 18])
@example(["--" + "x" * 100_000])
def test_flags(argv: list[str]) -> None:
    run("flags", flagged, argv, refusals=(UsageError,))
