"""Coefficient sets and numbers of steps: figures, what repeats, what the flag takes and how it is written back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_hyperp import arguments
from megatron_hyperp.coefficients import SETS, STEP_FAMILIES, Coefficients, Steps, coefficient_schedule
from megatron_hyperp.config import Config
from megatron_hyperp.errors import UsageError
from megatron_hyperp.optim.observing import MATRIX_GROUPS
from megatron_hyperp.optim.options import HyperPConfig

DENSE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 --vocab-size 64 --seq-length 16"
    " --global-batch-size 8 --train-iters 20"
)
MIXTURE = f"{DENSE} --num-experts 4"
# Coefficients of emerging-optimizers 0.3.0 and, of cubic5, its main branch; four digits of each triple.
PUBLISHED: dict[str, list[Coefficients]] = {
    "quintic": [(4.0848, -6.8946, 2.9270), (2.8366, -3.0525, 1.2012)],
    "polar_express": [(8.2051, -22.9019, 16.4607), (1.8750, -1.2500, 0.3750)],
    "cans": [(8.4703, -25.1081, 18.6293), (2.2737, -1.6447, 0.4162)],
    "aol": [(4.0098, -7.0585, 2.4635), (2.7215, -3.0494, 1.3169)],
    "deepseekv4": [(3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)],
    "cubic5": [(3.3657, -3.3421, 0.0), (2.2230, -0.9631, 0.0)],
}


def iterated(schedule: tuple[Coefficients, ...] | list[Coefficients], values: np.ndarray) -> np.ndarray:
    for a, b, c in schedule:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("name", SETS)
def test_figures_are_the_published_ones(name: str) -> None:
    # Those of Polar Express are published shrunk.
    triples = SETS[name].schedule(8) if name == "polar_express" else SETS[name].triples
    for found, published in zip((triples[0], triples[-1]), PUBLISHED[name], strict=True):
        assert found == pytest.approx(published, abs=1e-4)
    assert re.search(r"arXiv \d{4}\.\d{5}|DeepSeek-V4", SETS[name].source)


@pytest.mark.parametrize("name", SETS)
def test_a_set_brings_singular_values_near_one_and_turns_none_around(name: str) -> None:
    """Of any matrix of norm 1, however close to rank one it is."""
    known = SETS[name]
    values = np.geomspace(1e-6, 1.0, 20001)
    result = iterated(known.schedule(known.steps), values / known.margin)
    assert (result > 0).all()
    # What each set is made for: it lifts 5% of the norm to half the size at least, and nothing beyond 1.35.
    assert result[values > 0.05].min() > 0.5
    assert result.max() < 1.35


@pytest.mark.parametrize("name", SETS)
def test_more_steps_than_a_set_has_repeat_its_last(name: str) -> None:
    known = SETS[name]
    count = len(known.triples)
    assert known.schedule(count + 3)[count:] == (known.schedule(count)[-1],) * 3
    # They keep singular values where they are: near 1.
    values = np.linspace(0.6, 1.0, 401)
    for steps in range(count, count + 6):
        result = iterated(known.schedule(steps), values / known.margin)
        assert 0.6 < result.min() <= result.max() < 1.35


def test_sets_that_start_over_shrink_what_was_near_one() -> None:
    """As emerging-optimizers 0.3.0 does for quintic, cubic5 and aol: a sixth step is the first once more."""
    quintic = coefficient_schedule("quintic", 5)
    near_one = iterated(quintic, np.linspace(0.05, 1.0, 401))
    first = quintic[0]
    # p(1) = a + b + c of the first triple.
    assert sum(first) == pytest.approx(0.1172, abs=1e-4)
    assert np.median(iterated([first], near_one)) == pytest.approx(0.11, abs=0.03)
    assert np.median(iterated([quintic[-1]], near_one)) == pytest.approx(1.0, abs=0.03)
    # Five steps of aol, the default there, turn the whole update around.
    aol = SETS["aol"].schedule(4)
    assert np.median(iterated([*aol, aol[0]], np.linspace(0.05, 0.8, 401))) < -0.5
    # And without a margin a matrix of rank one is turned around by four.
    assert iterated(aol, np.ones(1))[0] < -0.9


def test_families_are_the_groups_of_matrices_that_metrics_know() -> None:
    assert STEP_FAMILIES == MATRIX_GROUPS


# The flag

GIVEN = [
    ("", "quintic", "5", {}),
    ("--ns-coefficients aol", "aol", "4", {}),
    ("--ns-coefficients deepseekv4", "deepseekv4", "10", {}),
    ("--ns-steps 5", "quintic", "5", {}),
    ("--ns-steps 7", "quintic", "7", {}),
    ("--ns-steps experts=3", "quintic", "5,experts=3", {"experts": 3}),
    ("--ns-steps 6,experts=3,router=8", "quintic", "6,experts=3,router=8", {"experts": 3, "router": 8}),
    ("--ns-steps experts=3,6", "quintic", "6,experts=3", {"experts": 3}),
    ("--ns-coefficients aol --ns-steps attention=5", "aol", "4,attention=5", {"attention": 5}),
]


@pytest.mark.parametrize(("flags", "coefficients", "text", "by_family"), GIVEN)
def test_steps_by_family_survive_flags_and_yaml(
    flags: str, coefficients: str, text: str, by_family: dict[str, int], tmp_path: Path
) -> None:
    config = arguments.parse(f"{MIXTURE} {flags}".split(), description="").resolve()
    assert config.optimizer.ns_coefficients == coefficients
    assert str(config.optimizer.steps) == text
    base = config.optimizer.steps.base
    assert {family: config.optimizer.steps.of(family) for family in STEP_FAMILIES} == {
        family: by_family.get(family, base) for family in STEP_FAMILIES
    }
    path = tmp_path / "config.yaml"
    path.write_text(arguments.to_yaml(config))
    assert arguments.load_yaml(path).resolve() == config == arguments.load_stored(path).resolve()


def test_steps_that_a_set_is_made_for_are_no_setting() -> None:
    """So that neither checkpoints of earlier versions, which wrote 5, nor keys of sweeps see a difference."""
    for given, stored in (("5", None), (" 5 ", None), ("7", "7"), ("experts=5", "5,experts=5")):
        config = arguments.from_dict({"optimizer": {"ns_steps": given}}, source="test")
        assert config.optimizer.steps.text("quintic") == stored


def test_earlier_checkpoints_wrote_a_number(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {ns_steps: 5}")
    assert arguments.load_stored(path) == Config()
    path.write_text("optimizer: {ns_steps: 6}")
    assert arguments.load_stored(path).optimizer.ns_steps == "6"


@pytest.mark.parametrize(
    "text",
    [
        *("0", "-1", "31", "5.0", "", "many", "5,6", "5,", "5;experts=3", "\u0663", "9" * 5000),
        *("experts", "experts=", "experts=0", "experts=3,experts=4", "heads=3", "experts=3=4"),
    ],
)
def test_what_says_no_steps_is_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Steps.parse(text, "quintic")
    message = str(caught.value)
    assert message.startswith("--ns-steps is '")
    assert message.endswith(
        "give a number from 1 to 30, and other numbers of families after it, each once: 5,experts=3"
        " (families are attention, mlp, experts, router)"
    )
    assert "\n" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("model", "family", "words"),
    [
        (DENSE, "experts", "--ns-steps experts=3 is of matrices that this model does not have; it has attention, mlp"),
        (DENSE, "router", "--ns-steps router=3 is of matrices that this model does not have; it has attention, mlp"),
        (MIXTURE, "mlp", "--ns-steps mlp=3 is of matrices that this model does not have; it has attention, experts,"),
    ],
)
def test_steps_of_what_a_model_has_none_of_are_refused(model: str, family: str, words: str) -> None:
    config = arguments.parse([*model.split(), "--ns-steps", f"{family}=3"], description="")
    with pytest.raises(UsageError, match=re.escape(words)):
        config.resolve()


def test_an_unknown_set_is_one_line() -> None:
    words = "--ns-coefficients is 'quartic'; allowed are quintic, polar_express, cans, aol, deepseekv4, cubic5"
    with pytest.raises(UsageError, match=re.escape(words)):
        arguments.parse(["--ns-coefficients", "quartic"], description="")


def test_options_make_one_iteration_per_family() -> None:
    options = HyperPConfig(lr=1.0, ns_steps="6,experts=3", ns_coefficients="cans", ns_dtype="fp32")
    assert [options.newton_schulz(family).steps for family in ("experts", "mlp", "output")] == [3, 6, 6]
    assert HyperPConfig(lr=1.0, ns_coefficients="deepseekv4").newton_schulz("mlp").steps == 10
    assert HyperPConfig(lr=1.0, ns_steps=7).newton_schulz("mlp").steps == 7
