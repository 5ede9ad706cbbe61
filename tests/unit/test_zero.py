"""An explicit 0 is 0: a number that is given as 0 stays 0 or is refused, and is never replaced by a derived value."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import yaml

from megatron_hyperp import arguments
from megatron_hyperp.config import Config, flag_name
from megatron_hyperp.errors import UsageError
from megatron_hyperp.training.compatibility import changed_settings, check_compatible
from megatron_hyperp.training.logging import CONFIG_FILE

# Between them, every field is derived in one of these.
BASES = {
    "depth": "--depth 2 --aspect-ratio 32 --vocab-size 64",
    "sizes": "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --vocab-size 64 --train-tokens 1e6",
    "sparsity": "--depth 2 --aspect-ratio 32 --vocab-size 64 --moe-sparsity 4 --moe-topk 2 --moe-shared-expert",
    "experts": "--depth 2 --aspect-ratio 32 --vocab-size 64 --num-experts 4",
}


def numeric_fields() -> list[tuple[str, str]]:
    """Section and name of every field that takes a number."""
    found = []
    for section, kind in arguments.section_types().items():
        for name, hint in typing.get_type_hints(kind).items():
            if {int, float} & {hint, *typing.get_args(hint)}:
                found.append((section, name))
    return found


def base(flags: str) -> Config:
    return arguments.parse(flags.split(), description="")


def resolved_with(flags: str, section: str, name: str, value: object) -> Config:
    config = base(flags)
    given = arguments.from_dict({section: {name: value}}, source="here")
    setattr(getattr(config, section), name, getattr(getattr(given, section), name))
    return config.resolve(tokenizer_vocab_size=64)


@pytest.mark.parametrize("flags", BASES.values(), ids=BASES)
@pytest.mark.parametrize(("section", "name"), numeric_fields(), ids=lambda word: word)
def test_zero_stays_zero_or_is_refused(section: str, name: str, flags: str) -> None:
    message = ""
    try:
        value = getattr(getattr(resolved_with(flags, section, name, 0), section), name)
    except UsageError as error:
        value, message = None, str(error)
    assert value == 0 or re.match(rf"{flag_name(name)} (is )?0\b.*$", message), message


@pytest.mark.parametrize("flags", BASES.values(), ids=BASES)
def test_null_is_the_same_as_leaving_a_field_out(flags: str) -> None:
    defaults = Config().to_dict()
    for section, name in numeric_fields():
        if defaults[section][name] is None and flag_name(name) not in flags.split():
            assert resolved_with(flags, section, name, None) == base(flags).resolve(tokenizer_vocab_size=64), name


def test_a_refused_zero_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"^--train-iters is 0; it must be greater than 0, or left out to be derived$"):
        base(f"{BASES['depth']} --train-iters 0").resolve()
    with pytest.raises(UsageError, match=r"--moe-router-topk is 0, but the model has experts; .* or leave it out$"):
        base(f"{BASES['experts']} --moe-router-topk 0").resolve()
    with pytest.raises(UsageError, match=r"--num-experts 0 makes a dense model, but .*; leave the first out"):
        base(f"{BASES['sparsity']} --num-experts 0").resolve()


def test_none_unsets_what_a_file_sets(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("training: {train_iters: 5}\ncheckpoint: {save: here}")
    words = f"--config {tmp_path}/base.yaml --train-iters none --save none"
    config = base(words)
    assert (config.training.train_iters, config.checkpoint.save) == (None, "none")


@pytest.mark.parametrize("flags", BASES.values(), ids=BASES)
def test_a_resolved_config_resolves_to_itself(flags: str) -> None:
    resolved = base(flags).resolve()
    again = arguments.from_dict(yaml.safe_load(arguments.to_yaml(resolved)), source="written")
    assert again == resolved == again.resolve()


@pytest.mark.parametrize("flags", BASES.values(), ids=BASES)
def test_checkpoints_of_earlier_versions_load(flags: str, tmp_path: Path) -> None:
    """They hold 0 for what was not set, which a run's own config may not."""
    config = base(flags).resolve()
    content = config.to_dict()
    unset = [("moe", "moe_sparsity"), ("moe", "moe_topk"), ("parallel", "ddp_bucket_size")]
    for section, name in unset:
        content[section][name] = content[section][name] or 0
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(content))
    assert arguments.load_stored(tmp_path / CONFIG_FILE).resolve() == config
    check_compatible(tmp_path, config)
    assert changed_settings(tmp_path, config) == []


def test_weights_that_earlier_versions_imported_load(tmp_path: Path) -> None:
    """Their configs have no training, so that its length is 0."""
    config = base(BASES["depth"]).resolve().to_dict()
    config["training"] |= {"global_batch_size": 0, "train_iters": 0, "train_tokens": 0.0}
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(config))
    training = arguments.load_stored(tmp_path / CONFIG_FILE).training
    assert (training.global_batch_size, training.train_iters, training.train_tokens) == (None, None, None)
    with pytest.raises(UsageError, match=r"--global-batch-size is 0"):
        arguments.load_yaml(tmp_path / CONFIG_FILE).resolve()
