"""The learning rate of each role by a config: what it takes of the shared one, and what cannot be asked of it."""

from __future__ import annotations

import math

from megatron_hyperp import transfer
from megatron_hyperp.config import Config, flag_name
from megatron_hyperp.errors import UsageError
from megatron_hyperp.role_laws import QK_GAINS, TITLES, RoleLaw, RoleRate, parse_exponents, role_laws


def laws(config: Config) -> dict[str, RoleLaw]:
    """Return the law of every role, a key of ``megatron_hyperp.role_laws.TITLES``.

    Raises:
        UsageError: ``--lr-exponents`` cannot be read.
    """
    options, preset = config.optimizer, config.preset
    factors = {
        "router": options.router_lr_mult,
        "output": options.adam_lr_mult if options.output_lr_mult is None else options.output_lr_mult,
        "embedding": options.embedding_lr_mult,
        "vector": options.adam_lr_mult,
    }
    if preset is not None:
        factors = {role: factor * preset.factors.get(role, 1.0) for role, factor in factors.items()}
    return role_laws(
        factors=factors,
        qk_factor=options.qk_norm_lr_mult,
        width_mup=config.recipe.width_mup,
        exponents=parse_exponents(options.lr_exponents),
    )


def lr_multipliers(config: Config) -> dict[str, float]:
    """Return what each role's learning rate is over the shared one, by a resolved config.

    Keys are those of ``megatron_hyperp.role_laws.TITLES``: hidden, router, output, embedding, vector, and qk_norm for
    the gains on queries and keys. Roles that the model does not have are among them.
    """
    sizes, base = config.sizes, config.base_sizes
    return {role: law.multiplier(sizes, base) for role, law in laws(config).items()}


def role_rates(config: Config) -> tuple[RoleRate, ...]:
    """Return what each role that the model has takes of the shared learning rate, with the factors that make it."""
    each, absent = laws(config), _absent(config)
    if each[QK_GAINS] == each["vector"]:
        absent.add(QK_GAINS)
    sizes, base = config.sizes, config.base_sizes
    return tuple(
        RoleRate(role, law.factor, law.powers(sizes, base)) for role, law in each.items() if role not in absent
    )


def _absent(config: Config) -> set[str]:
    """Roles of which the model has no parameters."""
    absent = set() if config.moe.num_experts else {"router"}
    absent |= set() if config.model.untie_embeddings_and_output_weights else {"output"}
    return absent | (set() if config.model.qk_layernorm else {QK_GAINS})


def check(config: Config) -> None:
    """See that each role's learning rate is a number, and that every setting of one has an effect.

    Raises:
        UsageError: one is not, or has none.
    """
    _check_preset(config)
    _check_absent(config)
    each = laws(config)
    for role, multiplier in lr_multipliers(config).items():
        if not math.isfinite(multiplier) or (multiplier == 0 < each[role].factor):
            raise UsageError(
                f"the learning rate of the {TITLES[role]} would be {multiplier:g} times the shared one; look at its"
                " factor and its --lr-exponents"
            )


def _check_preset(config: Config) -> None:
    name, optimizer = config.transfer.lr_preset, config.optimizer.optimizer
    if config.preset is None:
        return
    if optimizer not in transfer.PRESET_OPTIMIZERS:
        raise UsageError(
            f"--lr-preset {name} is the law of MuonH, which --optimizer {optimizer} is not; give"
            f" {' or '.join(transfer.PRESET_OPTIMIZERS)}, or --lr-preset paper"
        )
    if config.transfer.token_exponent != transfer.TOKEN_EXPONENT:
        raise UsageError(
            f"--token-exponent {config.transfer.token_exponent:g} is of the paper's law, but --lr-preset {name} has"
            f" {-config.preset.law.tokens:g}; leave one of them out"
        )


def _check_absent(config: Config) -> None:
    """Refuse laws of roles that the model does not have; of gains on queries and keys, ``--qk-norm-lr-mult``."""
    options, powers = config.optimizer, parse_exponents(config.optimizer.lr_exponents)
    settings = {
        "router": (
            options.router_lr_mult != 1.0,
            "router_lr_mult",
            "needs experts; give --num-experts, or leave it out",
        ),
        "output": (
            options.output_lr_mult is not None,
            "output_lr_mult",
            "is of an output layer that --no-untie-embeddings-and-output-weights leaves out; leave one of them out",
        ),
    }
    for role in settings.keys() & _absent(config):
        given, name, why = settings[role]
        if given or role in powers:
            asked = f"{flag_name(name)} {getattr(options, name):g}" if given else f"--lr-exponents {role}:"
            raise UsageError(f"{asked} {why}")
    if options.qk_norm_lr_mult != 1.0 and QK_GAINS in _absent(config):
        raise UsageError("--qk-norm-lr-mult is of gains that --no-qk-layernorm leaves out; leave one of them out")
