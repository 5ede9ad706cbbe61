"""The HyperP transfer laws: from numbers tuned once on the base model to those of any other model.

Every function is pure. Sources: HyperP, arXiv 2603.28743; the optimizer baselines of its comparison follow
microsoft/ArchScale. Notation: depth d, tokens T, batch B (in tokens); the index 0 marks the base model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_hyperp.role_laws import Factor, RoleLaw, RoleRate, Sizes

BASE_DEPTH = 8
BASE_TOKENS = 10_400_000_000
BASE_BATCH_TOKENS = 2**21
TOKEN_EXPONENT = 0.32
BASE_HEAD_SIZE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which laws an optimizer's recipe applies.

    Attributes:
        eta0: learning rate of the dense base model.
        moe_eta0: learning rate of the mixture-of-experts base model.
        weight_decay: weight decay of the base model.
        depth_law: learning rate times sqrt(d0/d).
        token_law: learning rate times (T/T0)^-exponent.
        batch_law: learning rate times sqrt(B/B0).
        depth_mup: residual branches times 1/sqrt(2L).
        decay_law: weight decay times d0/d (arXiv 2512.05620).
        width_mup: learning rate of hidden matrices, and logits, times w0/w (muP for Adam).
        spheres: hidden matrices are trained on spheres.
    """

    eta0: float
    moe_eta0: float
    weight_decay: float
    depth_law: bool = False
    token_law: bool = False
    batch_law: bool = False
    depth_mup: bool = False
    decay_law: bool = False
    width_mup: bool = False
    spheres: bool = False


# eta0: MuonH with QK-norm from the HyperP paper (1.5e-2 dense, 1.4e-2 mixture of experts); muP AdamW and the weight
# decay 0.1 from ArchScale's defaults. The Muon and NorMuon baselines have no published base value for this
# parametrisation, and NorMuonH has MuonH's: tune them before a comparison.
RECIPES: dict[str, Recipe] = {
    "hyperp": Recipe(
        eta0=1.5e-2,
        moe_eta0=1.4e-2,
        weight_decay=0.0,
        depth_law=True,
        token_law=True,
        batch_law=True,
        depth_mup=True,
        spheres=True,
    ),
    "muonh": Recipe(eta0=1.5e-2, moe_eta0=1.4e-2, weight_decay=0.0, spheres=True),
    "muon": Recipe(
        eta0=1.5e-2,
        moe_eta0=1.5e-2,
        weight_decay=0.1,
        depth_law=True,
        batch_law=True,
        depth_mup=True,
        decay_law=True,
    ),
    "adamw": Recipe(eta0=6e-4, moe_eta0=6e-4, weight_decay=0.1, batch_law=True, width_mup=True),
}
# NorMuon has the laws of Muon, on the sphere and off it.
RECIPES |= {"normuonh": RECIPES["hyperp"], "normuon": RECIPES["muon"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published law that takes the place of the recipe's.

    Attributes:
        law: of the learning rate of hidden matrices; its factor is the learning rate at the unit.
        unit: sizes over which its powers are taken.
        factors: of other roles' learning rates, over that of hidden matrices; 1 where there is none.
    """

    law: RoleLaw
    unit: Sizes
    factors: Mapping[str, float] = field(default_factory=dict)


# Whose matrices are orthogonalized and on spheres, as those of published presets are.
PRESET_OPTIMIZERS = ("hyperp", "muonh")
# marin-2608: github.com/marin-community/marin, issue 7856 (5 August 2026): 34.35 tokens^-0.346 hidden^-0.345 batch^0.5,
# the batch in sequences of 8192 tokens. Its Adam parameters take 3/13 of that (MoeHeuristic.muonh_ratio in
# experiments/grug/moe_hero_ep/heuristic.py; which they are: optimizer.py there). Caveats: docs/scaling.md.
PRESETS: dict[str, Preset | None] = {
    "paper": None,
    "marin-2608": Preset(
        law=RoleLaw(factor=34.35, width=-0.345, tokens=-0.346, batch=0.5),
        unit=Sizes(width=1, depth=1, tokens=1, batch=8192),
        factors={"router": 3 / 13, "embedding": 3 / 13, "vector": 3 / 13},
    ),
}


@dataclass(frozen=True, slots=True)
class LearningRate:
    """A transferred learning rate with the factors that made it.

    Attributes:
        eta0: the base learning rate.
        factors: name of the law, its formula with numbers, its value.
        roles: what each role takes of it.
        origin: what eta0 is.
    """

    eta0: float
    factors: tuple[Factor, ...]
    roles: tuple[RoleRate, ...] = ()
    origin: str = "eta0"

    @property
    def multiplier(self) -> float:
        """Product of all factors."""
        return math.prod(value for _, _, value in self.factors)

    @property
    def value(self) -> float:
        """The peak learning rate eta."""
        return self.eta0 * self.multiplier

    def describe(self) -> str:
        """Return the decision, one factor a line, then one line for each role whose learning rate is another."""
        lines = [f"learning rate {self.value:.6g} = {self.eta0:g} ({self.origin})"]
        lines += [f"    x {value:<8.4g} {name}: {formula}" for name, formula, value in self.factors]
        lines += [f"    {role.describe(self.value)}" for role in self.roles if role.multiplier != 1]
        return "\n".join(lines)


def learning_rate(
    recipe: Recipe,
    *,
    eta0: float,
    depth: int,
    tokens: float,
    batch_tokens: float,
    base_depth: int = BASE_DEPTH,
    base_tokens: float = BASE_TOKENS,
    base_batch_tokens: float = BASE_BATCH_TOKENS,
    token_exponent: float = TOKEN_EXPONENT,
) -> LearningRate:
    """Transfer the base learning rate: eta = eta0 sqrt(d0/d) (T/T0)^-0.32 sqrt(B/B0), each law if the recipe has it.

    There is no width term: on the sphere the step is a fraction of the matrix's own radius (arXiv 2603.28743).

    Args:
        recipe: which laws apply, see :data:`RECIPES`.
        eta0: learning rate tuned on the base model.
        depth: number of layers d.
        tokens: training tokens T.
        batch_tokens: tokens per global batch B.
        base_depth: d0.
        base_tokens: T0.
        base_batch_tokens: B0.
        token_exponent: the fitted exponent of T/T0, without its sign.
    """
    factors: list[tuple[str, str, float]] = []
    if recipe.depth_law:
        factors.append(("depth", f"sqrt({base_depth} / {depth})", math.sqrt(base_depth / depth)))
    if recipe.token_law:
        ratio = tokens / base_tokens
        factors.append(("tokens", f"({tokens:.4g} / {base_tokens:.4g})^-{token_exponent:g}", ratio**-token_exponent))
    if recipe.batch_law:
        formula = f"sqrt({batch_tokens:,.0f} / {base_batch_tokens:,.0f} tokens)"
        factors.append(("batch", formula, math.sqrt(batch_tokens / base_batch_tokens)))
    return LearningRate(eta0, tuple(factors))


def preset_learning_rate(name: str, sizes: Sizes, *, base: Sizes, eta0: float | None) -> LearningRate:
    """Return the learning rate of hidden matrices by a preset that has a law of its own.

    Args:
        name: a key of :data:`PRESETS`, not of the paper's laws.
        sizes: of the model and its training.
        base: of the base model.
        eta0: learning rate tuned on the base model, from which the preset's exponents start; None: the preset's own.
    """
    preset = PRESETS[name]
    assert preset is not None
    if eta0 is None:
        return LearningRate(preset.law.factor, preset.law.powers(sizes, preset.unit), origin=f"coefficient of {name}")
    return LearningRate(eta0, preset.law.powers(sizes, base))


def weight_decay(recipe: Recipe, *, base_weight_decay: float, depth: int, base_depth: int = BASE_DEPTH) -> float:
    """Transfer the weight decay: lambda = lambda0 d0/d for the Muon baseline (arXiv 2512.05620), else lambda0."""
    return base_weight_decay * (base_depth / depth if recipe.decay_law else 1.0)


def residual_multiplier(recipe: Recipe, num_layers: int) -> float:
    """Depth-muP factor 1/sqrt(2L) on every attention and MLP output, or 1 for recipes without it."""
    return 1.0 / math.sqrt(2.0 * num_layers) if recipe.depth_mup else 1.0


def softmax_scale(head_size: int) -> float:
    """Attention logits' scale sqrt(128)/d_head: 1/sqrt(d_head) at d_head = 128, and 1/d_head in its scaling (muP)."""
    return math.sqrt(BASE_HEAD_SIZE) / head_size


def token_budget(parameters: int, base_parameters: int, base_tokens: float = BASE_TOKENS) -> int:
    """Training tokens T(d) = T0 N(d)/N(d0), rounded to a whole token."""
    return round(base_tokens * parameters / base_parameters)
