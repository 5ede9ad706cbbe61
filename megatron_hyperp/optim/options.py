"""What the optimizer is asked to do: one frozen dataclass, which needs no trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_hyperp import device
from megatron_hyperp.coefficients import Steps
from megatron_hyperp.optim.fading import check_zero_gradients
from megatron_hyperp.optim.orthogonalize import NewtonSchulz
from megatron_hyperp.optim.rules import UpdateRule, rule_class
from megatron_hyperp.optim.tensor_parallel import AUTO

# Of which learning rates have factors.
ROLES = ("hidden", "router", "output", "embedding", "vector", "qk_norm")
# The rule of each role, by recipe (arXiv 2603.28743, section on the optimizer's assignment).
RECIPES: dict[str, dict[str, str]] = {
    "hyperp": {"hidden": "muonh", "output": "adamh"},
    "muonh": {"hidden": "muonh", "output": "adamh"},
    "normuonh": {"hidden": "normuonh", "output": "adamh"},
    "muon": {"hidden": "muon", "output": "adamw"},
    "normuon": {"hidden": "normuon", "output": "adamw"},
    "adamw": {"hidden": "adamw", "output": "adamw"},
}


Rule = str | type[UpdateRule]


def rules_of(recipe: str, *, rule: Rule | None = None, router_rule: Rule | None = None) -> dict[str, type[UpdateRule]]:
    """Return the rule's class of each role.

    Args:
        recipe: a key of :data:`RECIPES`.
        rule: of hidden matrices, in place of the recipe's.
        router_rule: of routers, in place of that of hidden matrices.

    Raises:
        UsageError: an unknown rule.
    """
    rules: dict[str, Rule] = {**RECIPES[recipe], "embedding": "adamw", "vector": "adamw"}
    rules["hidden"] = rule or rules["hidden"]
    rules["router"] = router_rule or rules["hidden"]
    return {role: rule_class(each) for role, each in rules.items()}


@dataclass(frozen=True, kw_only=True)
class HyperPConfig:
    """How to update a model.

    Attributes:
        lr: peak learning rate; on a sphere, the step as a fraction of the radius.
        min_lr: learning rate at the end of a schedule, for Megatron-Core's OptimizerParamScheduler.
        optimizer: recipe, a key of :data:`RECIPES`: which rule each role gets.
        rule: of hidden matrices, in place of the recipe's: a registered name, ``FILE.py:CLASS`` or a class.
        router_rule: of routers of experts, in place of that of hidden matrices.
        overrides: rules by pattern of the parameter's name (fnmatch), in place of all others; the first that matches.
        lr_mults: factors on the learning rate by role: "hidden", "router", "output", "embedding", "vector",
            "qk_norm" (gains on queries and keys, else that of "vector"). 1 where a role is left out.
        weight_decay: lambda, on matrices.
        clip_grad: largest global gradient norm; 0 switches clipping off.
        momentum: mu of Muon.
        nesterov: orthogonalize mu M + G rather than M.
        momentum_dtype: in which Muon's momentum is kept, fp32 or bf16.
        adam_betas: decays of Adam's moments.
        adam_eps: added to the root of the second.
        ns_steps: Newton-Schulz steps, or text such as "5,experts=3" where families differ; None: as many as the
            coefficient set is made for.
        ns_coefficients: coefficient set, a key of :data:`~megatron_hyperp.coefficients.SETS`.
        ns_dtype: "fp32", "bf16", "fp16", or "auto": bf16 under CUDA (fp16 in Gram form), fp32 on CPU.
        ns_form: "standard", "gram" or "auto", see :class:`~megatron_hyperp.optim.orthogonalize.NewtonSchulz`.
        ns_backend: "torch" or "quack".
        ns_strategy: how ranks share Newton-Schulz: "gather", "all_to_all", "gram" or "auto".
        matrix_split: what is one matrix: "fused" QKV and gate/up weights, each "component" of them, or each "head".
        zero_gradients: what a matrix on its sphere does while its gradient is exactly zero: "fade", its step fades as
            its momentum does; "walk", it moves on at full step along its last momentum, as other implementations do.
        radius_scale: factor on the radii of hidden matrices, sqrt(d_out/3) (arXiv 2603.28743).
        output_init_std: standard deviation of the output layer's initial weights, which fixes its radius.
        radii: of spheres that do not follow from shapes, by the parameter's name.

    Raises:
        ValueError: an unknown recipe, an unknown choice of ``zero_gradients`` or ``matrix_split``, a momentum dtype
            other than fp32 and bf16, or a role that ``lr_mults`` does not have.
    """

    lr: float
    min_lr: float = 0.0
    optimizer: str = "hyperp"
    rule: str | type[UpdateRule] | None = None
    router_rule: str | type[UpdateRule] | None = None
    overrides: Mapping[str, str | type[UpdateRule]] = field(default_factory=dict)
    lr_mults: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    momentum_dtype: torch.dtype = torch.float32
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    ns_steps: int | str | None = None
    ns_coefficients: str = "quintic"
    ns_dtype: str = "auto"
    ns_form: str = "auto"
    ns_backend: str = "torch"
    ns_strategy: str = AUTO
    matrix_split: Literal["fused", "component", "head"] = "fused"
    zero_gradients: Literal["fade", "walk"] = "fade"
    radius_scale: float = 1.0
    output_init_std: float = 0.02
    radii: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        check_zero_gradients(self.zero_gradients)
        for name, value, allowed in (
            ("optimizer", self.optimizer, tuple(RECIPES)),
            ("matrix_split", self.matrix_split, ("fused", "component", "head")),
            ("momentum_dtype", self.momentum_dtype, (torch.float32, torch.bfloat16)),
            *(("a role of lr_mults", role, ROLES) for role in self.lr_mults),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; known are {', '.join(map(str, allowed))}")

    def newton_schulz(self, family: str) -> NewtonSchulz:
        """Return Newton-Schulz for a family of matrices.

        Args:
            family: one of :data:`~megatron_hyperp.parameters.GROUPS`.
        """
        steps = Steps.parse(None if self.ns_steps is None else str(self.ns_steps), self.ns_coefficients)
        return NewtonSchulz(
            steps=steps.of(family),
            coefficients=self.ns_coefficients,
            dtype=device.newton_schulz_dtype(self.ns_dtype, gram=self.asks_for_gram),
            form=self.ns_form,
            backend=self.ns_backend,
        )

    @property
    def asks_for_gram(self) -> bool:
        """Whether Newton-Schulz is to run in Gram form, for which bf16 is too coarse."""
        return "gram" in (self.ns_form, self.ns_strategy)

    def rules(self) -> dict[str, type[UpdateRule]]:
        """Return the rule's class of each role.

        Raises:
            UsageError: an unknown rule.
        """
        return rules_of(self.optimizer, rule=self.rule, router_rule=self.router_rule)
