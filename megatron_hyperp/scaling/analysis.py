"""From groups of runs to what a reader wants to know: best learning rates beside their law, and loss over compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from megatron_hyperp import transfer
from megatron_hyperp.errors import UsageError
from megatron_hyperp.role_laws import Sizes
from megatron_hyperp.scaling.fit import (
    Exponent,
    Leverage,
    Optimum,
    PowerLaw,
    leverage,
    optimal_lr,
    power_law,
    token_exponent,
)
from megatron_hyperp.scaling.groups import Group, best_by_flops, matching, series, shown

# A step of the usual grid of learning rates, in which shifts are told.
GRID_STEP = math.log(math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Tuned:
    """A group and its best learning rate.

    Attributes:
        group: the runs.
        optimum: None where they do not determine one.
        refusal: why not, and the way out.
    """

    group: Group
    optimum: Optimum | None
    refusal: str = ""


def tune(groups: Iterable[Group]) -> list[Tuned]:
    """Fit the best learning rate of each group, as far as its runs allow."""
    return [_tune(group) for group in groups]


def _tune(group: Group) -> Tuned:
    try:
        return Tuned(group, optimal_lr(*group.trainings()))
    except ValueError as error:
        return Tuned(group, None, str(error))


@dataclass(frozen=True, slots=True)
class Base:
    """The group from which a method's learning rate transfers.

    Attributes:
        group: the base model's runs.
        optimum: its best learning rate.
        token_exponent: of the recipe's law.
        preset: law in place of the recipe's, where the file does not name one.
    """

    group: Group
    optimum: Optimum
    token_exponent: float = transfer.TOKEN_EXPONENT
    preset: str = "paper"

    def law(self, group: Group) -> float | None:
        """What the transfer law makes of the base's learning rate for another group.

        None for unknown recipes, and for presets with a law of the width where the file has no widths. Where it has no
        batch sizes, they are taken to be equal.
        """
        recipe, preset = recipe_of(group), preset_of(group, self.preset)
        if recipe is None or preset not in transfer.PRESETS:
            return None
        base_batch = batch_tokens(self.group) or 1.0
        if transfer.PRESETS[preset] is not None:
            own, base = _sizes(group, base_batch), _sizes(self.group, base_batch)
            if own is None or base is None:
                return None
            return transfer.preset_learning_rate(preset, own, base=base, eta0=self.optimum.lr).value
        return transfer.learning_rate(
            recipe,
            eta0=self.optimum.lr,
            depth=round(group.number("depth")),
            tokens=group.number("tokens"),
            batch_tokens=batch_tokens(group) or base_batch,
            base_depth=round(self.group.number("depth")),
            base_tokens=self.group.number("tokens"),
            base_batch_tokens=base_batch,
            token_exponent=self.token_exponent,
        ).value


def recipe_of(group: Group) -> transfer.Recipe | None:
    """The recipe named by a group's ``optimizer``, where the file has that column, or by its method."""
    return transfer.RECIPES.get(_optimizer(group))


def _optimizer(group: Group) -> str:
    return str(group.runs[0].values.get("optimizer") or group.method)


def preset_of(group: Group, given: str) -> str:
    """The law named by a group's ``lr_preset``, where the file has that column, else as given; for MuonH alone."""
    of_muonh = _optimizer(group) in transfer.PRESET_OPTIMIZERS
    return str(group.runs[0].values.get("lr_preset", given)) if of_muonh else "paper"


def _sizes(group: Group, batch: float) -> Sizes | None:
    """What learning rates scale with; None where the width is not known. ``batch`` is that of files without any."""
    width = group.runs[0].values.get("hidden_size")
    if not isinstance(width, float):
        return None
    depth, tokens = group.number("depth"), group.number("tokens")
    return Sizes(width=width, depth=depth, tokens=tokens, batch=batch_tokens(group) or batch)


def batch_tokens(group: Group) -> float | None:
    """Tokens per batch, as far as the file has ``batch_tokens``, or ``global_batch_size`` and ``seq_length``."""
    for columns in (("batch_tokens",), ("global_batch_size", "seq_length")):
        values = [group.runs[0].values.get(column) for column in columns]
        numbers = [value for value in values if isinstance(value, float)]
        if len(numbers) == len(columns):
            return math.prod(numbers)
    return None


def find_bases(
    tuned: Sequence[Tuned],
    conditions: Sequence[str] = (),
    exponent: float = transfer.TOKEN_EXPONENT,
    preset: str = "paper",
) -> dict[str, Base]:
    """Return the base of each method: of its groups with a best learning rate, the one of the fewest FLOPs.

    Args:
        tuned: the groups of all methods.
        conditions: that a base meets, as those of :func:`megatron_hyperp.scaling.groups.matching`.
        exponent: of the tokens in the recipe's law.
        preset: law in place of the recipe's, where the file does not name one.

    Raises:
        UsageError: no run meets the conditions.
    """
    allowed = matching([entry.group.runs[0] for entry in tuned], conditions)
    bases: dict[str, Base] = {}
    for entry in sorted(tuned, key=lambda entry: entry.group.number("flops")):
        if entry.optimum and entry.group.method not in bases and entry.group.runs[0] in allowed:
            bases[entry.group.method] = Base(entry.group, entry.optimum, exponent, preset)
    return bases


def base_yaml(base: Base, *, source: str, batch: int | None, hidden_size: int | None, with_exponent: bool) -> str:
    """Write the base as a config file with the section ``transfer``.

    Args:
        base: what to write.
        source: name of the file with the runs.
        batch: tokens per batch, where that file does not have them.
        hidden_size: width, where that file does not have it.
        with_exponent: write the token exponent as well.

    Raises:
        UsageError: the batch, or a width that the method's law needs, is not known.
    """
    group, recipe, width = base.group, recipe_of(base.group), base.group.runs[0].values.get("hidden_size")
    known_batch = _agreed(batch_tokens(group), batch, "--batch-tokens", source)
    if not known_batch:
        raise UsageError(
            f"{source} does not tell the tokens per batch, which the base needs; give --batch-tokens, or a column"
            " batch_tokens"
        )
    known_width = _agreed(width if isinstance(width, float) else None, hidden_size, "--hidden-size", source)
    preset = preset_of(group, base.preset)
    if not known_width and (recipe is None or recipe.width_mup or transfer.PRESETS.get(preset) is not None):
        raise UsageError(
            f"{source} does not tell the width, on which {group.method}'s learning rate depends; give --hidden-size, or"
            " a column hidden_size"
        )
    section: dict[str, float | str] = {} if preset == "paper" else {"lr_preset": preset}
    section |= {"eta0": base.optimum.lr, "base_depth": round(group.number("depth"))}
    if known_width:
        section["base_hidden_size"] = round(known_width)
    section |= {"base_tokens": group.number("tokens"), "base_batch_tokens": round(known_batch)}
    if with_exponent:
        section["token_exponent"] = base.token_exponent
    spread = "" if base.optimum.spread is None else f", standard error {base.optimum.spread:.1%}"
    return (
        f"# The base of {group.name()} in {source},\n"
        f"# fitted to {len(base.optimum.window)} learning rates{spread}. The trainer takes it after a model's file:\n"
        "#   --config MODEL.yaml THIS.yaml\n"
    ) + yaml.safe_dump({"transfer": section}, sort_keys=False)


def _agreed(in_file: float | None, given: int | None, flag: str, source: str) -> float | None:
    """What the file or else the flag says; they must not contradict each other."""
    if in_file is not None and given is not None and in_file != given:
        raise UsageError(f"{flag} {given} contradicts {source}, which says {in_file:g}; leave it out")
    return given if in_file is None else in_file


@dataclass(frozen=True, slots=True)
class TokenFit:
    """The best learning rates of one model over its tokens.

    Attributes:
        name: of the model.
        points: its groups, by increasing tokens.
        exponent: None where they do not determine one.
        refusal: why not.
    """

    name: str
    points: list[Tuned]
    exponent: Exponent | None
    refusal: str = ""

    @property
    def method(self) -> str:
        """The optimizer's recipe, say."""
        return self.points[0].group.method


def token_fits(tuned: Sequence[Tuned]) -> list[TokenFit]:
    """Fit the token exponent of every model that was trained with two or more numbers of tokens."""
    by_key = {id(entry.group): entry for entry in tuned}
    fits = []
    for name, groups in series([entry.group for entry in tuned], "tokens").items():
        if len(groups) < 2:
            continue
        points = [by_key[id(group)] for group in groups]
        found = [(entry.group.number("tokens"), entry.optimum.lr) for entry in points if entry.optimum]
        try:
            fits.append(TokenFit(name, points, token_exponent([t for t, _ in found], [lr for _, lr in found])))
        except ValueError as error:
            fits.append(TokenFit(name, points, None, f"{error}; no best lr: {_untuned(points)}"))
    return fits


def _untuned(points: Sequence[Tuned]) -> str:
    return ", ".join(
        f"tokens={shown(entry.group.number('tokens'))} ({entry.refusal})" for entry in points if entry.refusal
    )


@dataclass(frozen=True, slots=True)
class LossFit:
    """A method's lowest losses over compute.

    Attributes:
        method: its name.
        points: loss by FLOPs, ascending.
        at_edge: how many of them are at the edge of a grid of learning rates, so that a better one may exist.
        law: None where the points do not determine one.
        refusal: why not.
    """

    method: str
    points: dict[float, float]
    at_edge: int
    law: PowerLaw | None
    refusal: str = ""


def loss_fits(groups: Sequence[Group]) -> list[LossFit]:
    """Fit L = A F^-b + C to each method's best losses."""
    fits = []
    for method in dict.fromkeys(group.method for group in groups):
        own = [group for group in groups if group.method == method]
        points = best_by_flops(own)
        at_edge = sum(_at_edge(group) for group in own)
        try:
            fits.append(LossFit(method, points, at_edge, power_law(list(points), list(points.values()))))
        except ValueError as error:
            fits.append(LossFit(method, points, at_edge, None, str(error)))
    return fits


def _at_edge(group: Group) -> bool:
    losses = list(group.mean_losses().values())
    return len(losses) > 1 and min(losses) in (losses[0], losses[-1])


@dataclass(frozen=True, slots=True)
class LeveragePoint:
    """One number of FLOPs of a method, beside the baseline.

    Attributes:
        method: its name.
        flops: used FLOPs.
        loss: the loss that they reached.
        measured: leverage of that loss.
        fitted: leverage of the method's own law there, which evens out noise; None without a law.
        refusal: why there is no leverage.
    """

    method: str
    flops: float
    loss: float
    measured: Leverage | None
    fitted: Leverage | None
    refusal: str = ""


def leverages(fits: Sequence[LossFit], baseline: str) -> list[LeveragePoint]:
    """Return the compute leverage of every method, the baseline itself included, at each of its points.

    Raises:
        UsageError: no such baseline, or one without a law.
    """
    own = next((fit for fit in fits if fit.method == baseline), None)
    if own is None:
        raise UsageError(f"--baseline {baseline} is no method of the file; there are {_names(fits)}")
    if own.law is None:
        raise UsageError(f"the baseline {baseline} has no law: {own.refusal}")
    return [_leverage(fit, flops, own.law) for fit in fits for flops in fit.points]


def _leverage(fit: LossFit, flops: float, baseline: PowerLaw) -> LeveragePoint:
    loss = fit.points[flops]
    try:
        measured = leverage(baseline, flops, loss)
        fitted = leverage(baseline, flops, fit.law.loss(flops)) if fit.law else None
    except ValueError as error:
        return LeveragePoint(fit.method, flops, loss, None, None, str(error))
    return LeveragePoint(fit.method, flops, loss, measured, fitted)


def _names(fits: Iterable[LossFit]) -> str:
    return ", ".join(fit.method for fit in fits)
