"""The scaling gamma of `h = W0 x + gamma * B A x`, and the number of clients that enters it.

    lora    gamma = alpha / r                  Hu et al. 2021, arXiv:2106.09685
    rslora  gamma = alpha / sqrt(r)            Kalajdzievski 2023, arXiv:2312.03732
    sfed    gamma = alpha * sqrt(N / r)        Huang et al. 2026, arXiv:2603.08058

The N of `sfed` undoes the shrinkage of an averaged A: the mean of N independent draws has 1/N of their variance. With
unequal weights N is the effective count `1 / sum_i w_i^2`. Which count a run uses is decided by the caller.

Not here: how A is drawn and averaged (`methods`), the layer that applies gamma (`layer`), files (`peft_format`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from peft import LoraConfig

from sfedlora.errors import ConfigError

__all__ = ["ScalingRule", "effective_clients", "peft_config", "scaling_factor"]

ScalingRule = Literal["lora", "rslora", "sfed"]


def scaling_factor(rule: ScalingRule, *, alpha: float, rank: int, num_clients: float = 1.0) -> float:
    """Gamma of one rule.

    Computed in the order in which stock PEFT computes it from `peft_config`, so both agree to the last bit.

    Args:
        rule: `lora`, `rslora` or `sfed`.
        alpha: the numerator of the rule, positive.
        rank: rank of A and B, at least 1.
        num_clients: N of `sfed`, an (effective) count of at least 1; the other rules do not use it.

    Returns:
        gamma.

    Raises:
        ConfigError: an unknown rule, or a number outside its range.
    """
    _check(rule, alpha, rank, num_clients)
    if rule == "lora":
        return alpha / rank
    return _lora_alpha(rule, alpha, num_clients) / math.sqrt(rank)


def effective_clients(weights: Sequence[float]) -> float:
    """The number of equally weighted clients whose average varies as much as this weighted one.

    `1 / sum_i p_i^2` with `p_i = w_i / sum_j w_j` (Kish's effective sample size): N for N equal weights, 1 for a
    single or an all-dominant one.

    Args:
        weights: one non-negative number per client, not necessarily normalised; at least one is positive.

    Returns:
        A number in [1, len(weights)].

    Raises:
        ConfigError: no weights, a negative or non-finite weight, or only zeros.
    """
    values = [float(weight) for weight in weights]
    if not values:
        raise ConfigError("no client weights given; expected one non-negative number per client")
    for position, value in enumerate(values):
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"weight {value} at position {position}; expected a finite number of at least 0")
    largest = max(values)
    if largest == 0:
        raise ConfigError(f"all {len(values)} client weights are 0; at least one must be positive")
    scaled = [value / largest for value in values]
    count = math.fsum(scaled) ** 2 / math.fsum(value * value for value in scaled)
    return min(max(count, 1.0), float(len(values)))


def peft_config(
    rule: ScalingRule,
    *,
    alpha: float,
    rank: int,
    num_clients: float = 1.0,
    target_modules: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> LoraConfig:
    """The stock PEFT configuration whose scaling is `scaling_factor(rule, ...)`.

    `sfed` is written as `lora_alpha = alpha * sqrt(num_clients)` with `use_rslora=True`, so PEFT needs no code of ours.

    Args:
        rule: `lora`, `rslora` or `sfed`.
        alpha: as in `scaling_factor`.
        rank: as in `scaling_factor`.
        num_clients: as in `scaling_factor`.
        target_modules: PEFT's `target_modules`: names, a regular expression, "all-linear", or None for its default.
        dropout: dropout on the LoRA input, in [0, 1).
        task_type: PEFT's `task_type`, for example "CAUSAL_LM" or "SEQ_CLS".
        modules_to_save: modules trained and saved in full.

    Returns:
        A `peft.LoraConfig`.

    Raises:
        ConfigError: an unknown rule, or a number outside its range.
    """
    _check(rule, alpha, rank, num_clients)
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout = {dropout}; expected a number in [0, 1)")
    names = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    return LoraConfig(
        r=rank,
        lora_alpha=_lora_alpha(rule, alpha, num_clients),  # a float: PEFT computes with it and stores it as it is
        use_rslora=rule != "lora",
        target_modules=names,
        lora_dropout=dropout,
        task_type=task_type,
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
    )


def _lora_alpha(rule: ScalingRule, alpha: float, num_clients: float) -> float:
    return alpha * math.sqrt(num_clients) if rule == "sfed" else alpha


def _check(rule: str, alpha: float, rank: int, num_clients: float) -> None:
    if rule not in get_args(ScalingRule):
        raise ConfigError(f"scaling {rule!r}; expected one of {', '.join(get_args(ScalingRule))}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank = {rank!r}; expected an integer of at least 1")
    if not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(f"alpha = {alpha!r}; expected a finite number above 0")
    if not math.isfinite(num_clients) or num_clients < 1:
        raise ConfigError(f"num_clients = {num_clients!r}; expected a finite number of at least 1")
