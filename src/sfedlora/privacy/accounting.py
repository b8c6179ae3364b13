"""What the noise of a run amounts to: (epsilon, delta), by Google's dp-accounting.

Two data sets are neighbours when they differ in all data of one client, replaced by any other data (replace-one): the
number of clients is public. The clipped sum then moves by up to 2 C, so its Gaussian noise of standard deviation z C is
one of multiplier z / 2, and this is what is accounted. A client that stays away moves it by at most C, less than that.

    central    a round is that Gaussian, on a cohort of m drawn from N without replacement (Wang, Balle,
               Kasiviswanathan, arXiv:1808.00087, theorem 27); m = N: on everybody
    local      a round in which the client took part is that Gaussian; drawing a cohort hides nobody from the server

Rounds compose by Renyi differential privacy (Mironov, arXiv:1702.07476).
"""

from __future__ import annotations

import importlib.util
import math

from sfedlora.errors import ConfigError
from sfedlora.privacy.examples import ExamplePrivacy
from sfedlora.privacy.mechanism import Privacy

__all__ = ["epsilon_after", "epsilon_of_rounds", "epsilon_of_steps", "require_accounting"]


def require_accounting() -> None:
    """Refuse a private run whose epsilon could not be stated.

    Raises:
        ConfigError: dp-accounting is not installed.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("privacy.mode: needs dp-accounting to state epsilon; pip install 'sfedlora[privacy]'")


def epsilon_after(privacy: Privacy, num_rounds: int) -> float | None:
    """Epsilon at the run's delta after some rounds of central privacy, for one who does not know the cohorts.

    The bound for samples is loose where nearly everybody is drawn, and never more than that of taking part in every
    round is stated. None where no finite number is known.
    """
    import dp_accounting

    in_all = epsilon_of_rounds(privacy, num_rounds)
    if privacy.cohort_size == privacy.num_clients:
        return in_all
    event = dp_accounting.GaussianDpEvent(_multiplier(privacy))
    drawn = dp_accounting.SampledWithoutReplacementDpEvent(privacy.num_clients, privacy.cohort_size, event)
    known = [epsilon for epsilon in (in_all, _epsilon(drawn, num_rounds, privacy.delta)) if epsilon is not None]
    return min(known, default=None)


def epsilon_of_rounds(privacy: Privacy, num_rounds: int) -> float | None:
    """Epsilon at the run's delta of a client that took part in so many rounds, for one who knows in which."""
    import dp_accounting

    return _epsilon(dp_accounting.GaussianDpEvent(_multiplier(privacy)), num_rounds, privacy.delta)


def epsilon_of_steps(privacy: ExamplePrivacy, num_steps: int) -> float | None:
    """Epsilon at the run's delta of an example that was in so many optimizer steps."""
    import dp_accounting

    return _epsilon(dp_accounting.GaussianDpEvent(_multiplier(privacy)), num_steps, privacy.delta)


def _multiplier(privacy: Privacy | ExamplePrivacy) -> float:
    """Standard deviation of the noise over what one replaced client or example can move."""
    return privacy.noise_multiplier / 2


def _epsilon(event: object, count: int, delta: float) -> float | None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(event, count)
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if math.isfinite(epsilon) else None
