"""A round of which the server learns the sum of the sites' changes and none of them.

    site      its change of the shared factors, times its weight, in whole numbers under masks: one message a round
    server    adds the messages as they come; opens the sum when all are there

What all sites must have been told alike enters their masks as `terms`: the configuration, the factors of the request,
the adapter's size, and the examples of the cohort. Of a server that tells them different things (factors from which
all but one site's change is known, examples that leave one site all the weight) the sum is noise. A site computes its
weight from its own number of examples, and uses the newest B that it has.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfedlora.config import RunConfig
from sfedlora.data.directories import safe_directory_name
from sfedlora.errors import ConfigError, RunError
from sfedlora.flower.envelope import Envelope, MessageError
from sfedlora.flower.protocol import RoundRequest, SecureRound
from sfedlora.flower.secure_keys import SiteKeys
from sfedlora.flower.settings import SiteSettings
from sfedlora.privacy.secure_sum import FEWEST_SITES, SecureSum, masked, opened, with_message
from sfedlora.storage import make_directory, owned, read_record, write_json
from sfedlora.types import Tensors

__all__ = ["Messages", "SecurePart", "SentMessages", "secure_part", "secure_round"]

_SENT = {"cohort": list, "terms": str, "sha256": str}


@dataclass(frozen=True)
class SentMessages:
    """What a site has sent under its key in one federation; kept for ever, a small file a round.

    Attributes:
        path: its folder.
    """

    path: Path

    def require_alike(self, total: SecureSum) -> None:
        """Refuse a sum of a round for which the site has sent a message into another one.

        Raises:
            MessageError: with other sites, or on other terms.
            StorageError: the record cannot be read.
        """
        sent = self._of(total.round_num)
        if sent is not None and sent["cohort"] != sorted(total.cohort):
            raise MessageError(f"round {total.round_num}: asked for another cohort than the one sent to before")
        if sent is not None and sent["terms"] != total.terms:
            raise MessageError(f"round {total.round_num}: asked again with other factors, sizes or examples")

    def keep(self, total: SecureSum, message: NDArray[np.uint32]) -> None:
        """Note a message before it is sent.

        Raises:
            MessageError: another one was sent for this round; both under the same masks would show their difference.
            InputError: another process of this site is at it.
            StorageError: the record cannot be read or written.
        """
        digest = hashlib.sha256(message.tobytes()).hexdigest()
        make_directory(self.path, private=True)
        with owned(self.path):
            self.require_alike(total)
            sent = self._of(total.round_num)
            if sent is None:
                entry = {"cohort": sorted(total.cohort), "terms": total.terms, "sha256": digest}
                write_json(self._file(total.round_num), entry)
            elif sent["sha256"] != digest:
                raise MessageError(f"round {total.round_num}: the change is another one than that sent before")

    def _of(self, round_num: int) -> dict[str, Any] | None:
        path = self._file(round_num)
        return read_record(path, _SENT) if path.exists() else None

    def _file(self, round_num: int) -> Path:
        return self.path / f"round-{round_num:06d}.json"


@dataclass(frozen=True)
class SecurePart:
    """A site's part in the sum of a round, checked.

    Attributes:
        total: the sum.
        site: its client id.
        weight: p_k.
        keys: its own and the others'.
        sent: what it has sent before.
    """

    total: SecureSum
    site: str
    weight: float
    keys: SiteKeys
    sent: SentMessages

    def message(self, before: Tensors, update: Tensors, names: Collection[str]) -> NDArray[np.uint32]:
        """What the site sends, noted as sent.

        Args:
            before: the factors that it was sent.
            update: the factors that it would send.
            names: of both, in the order of the message.

        Raises:
            LimitError: a value is beyond flower.secure_limit.
            MessageError: another message was sent for this round.
        """
        changes = (self.weight * (update[name].double() - before[name].double()).reshape(-1) for name in names)
        values = torch.cat([change.float() for change in changes]).numpy()
        keys = self.keys
        message = masked(self.total, self.site, values, private_key=keys.private_key, public_keys=keys.public_keys)
        self.sent.keep(self.total, message)
        return message


def secure_part(
    settings: SiteSettings,
    request: RoundRequest,
    envelope: Envelope,
    *,
    num_examples: int,
    rounds: Collection[int],
) -> SecurePart | None:
    """The site's part in the sum that a request asks for; None where it is not to train, or the run has none.

    Args:
        settings: of the site.
        request: the facts of the message.
        envelope: the message.
        num_examples: the site's own training examples.
        rounds: those whose B the site has.

    Raises:
        ConfigError: the site has no keys.
        MessageError: the request is none that an honest server sends, or differs from one answered before.
    """
    config, secure = settings.config, request.secure
    if (secure is not None) != (config.flower.secure_sum and request.train):
        raise MessageError("a secure sum is asked for if and only if flower.secure_sum is set and the site is to train")
    if secure is None:
        return None
    if settings.keys is None or config.flower.secure_limit is None:
        raise ConfigError("flower.secure_sum: a site needs secure-key and secure-public-keys in its node config")
    if request.wire_dtype != "uint32":
        raise MessageError(f"a secure sum in {request.wire_dtype}; expected uint32")
    _require_cohort(secure.cohort, request.client_id, settings.keys)
    newest = max((number for number in rounds if number < request.round_num), default=0)
    if request.personal_round != newest:
        raise MessageError(f"asked to use the B of round {request.personal_round}; the newest here is of {newest}")
    weight = _weight(config, secure, num_examples)
    total = SecureSum(
        request.federation_id,
        request.round_num,
        tuple(sorted(secure.cohort)),
        config.flower.secure_limit,
        terms=_terms(settings, request, envelope),
    )
    sent = SentMessages(settings.keys.sent / safe_directory_name(request.federation_id))
    sent.require_alike(total)
    return SecurePart(total, request.client_id, weight, settings.keys, sent)


def _require_cohort(cohort: Collection[str], site: str, keys: SiteKeys) -> None:
    if len({*cohort}) < max(FEWEST_SITES, len(cohort)) or site not in cohort:
        raise MessageError(
            f"a secure sum over {len(cohort)} sites; expected at least {FEWEST_SITES}, each once, with this one"
        )
    unknown = sorted({*cohort} - keys.public_keys.keys())
    if unknown:
        raise MessageError(f"a secure sum with {', '.join(unknown)}, whose public keys are not in secure-public-keys")


def _weight(config: RunConfig, secure: SecureRound, num_examples: int) -> float:
    """p_k of a site, of its own number of examples."""
    is_uniform = config.rounds.weighting == "uniform"
    if is_uniform != (secure.num_examples is None):
        raise MessageError("the number of examples of a cohort is told if and only if rounds.weighting is examples")
    if secure.num_examples is None:
        return 1.0 / len(secure.cohort)
    others = len(secure.cohort) - 1
    if secure.num_examples < num_examples + others:
        raise MessageError(
            f"a cohort of {secure.num_examples} examples; this site has {num_examples}, and {others} others have some"
        )
    return num_examples / secure.num_examples


def _terms(settings: SiteSettings, request: RoundRequest, envelope: Envelope) -> str:
    """Digest of what must be alike at all sites of a cohort, apart from federation, round and cohort."""
    alike = {
        "config": settings.digest,
        "factors": hashlib.sha256(envelope.data).hexdigest(),
        "dtype": envelope.dtype,
        "num_examples": request.secure.num_examples if request.secure else None,
        **request.model_dump(mode="json", include={"layout", "rank", "scaling", "draw_rank"}),
    }
    return hashlib.sha256(json.dumps(alike, sort_keys=True).encode()).hexdigest()


def secure_round(config: RunConfig, cohort: Mapping[str, int]) -> SecureRound | None:
    """What the server tells the sites of a cohort (client id -> training examples); None without secure sums."""
    if not config.flower.secure_sum:
        return None
    num_examples = None if config.rounds.weighting == "uniform" else sum(cohort.values())
    return SecureRound(cohort=sorted(cohort), num_examples=num_examples)


class Messages:
    """Owner of the sum of the messages of a round: one accumulator, whatever the number of sites."""

    def __init__(self, config: RunConfig, round_num: int, secure: SecureRound) -> None:
        """No message has come yet."""
        federation_id, limit = config.flower.federation_id or "", config.flower.secure_limit or 0.0
        self._total = SecureSum(federation_id, round_num, tuple(secure.cohort), limit)
        self._so_far: NDArray[np.uint32] | None = None
        self._senders: list[str] = []

    def add(self, client_id: str, message: NDArray[np.uint32]) -> None:
        """Add a message."""
        self._so_far = with_message(self._so_far, message)
        self._senders.append(client_id)

    def opened(self, shapes: Mapping[str, tuple[int, ...]], failed: Mapping[str, str]) -> dict[str, Tensor]:
        """The weighted sum of the changes of all sites, in float64.

        Args:
            shapes: name -> shape of the factors, in the order of the messages.
            failed: client id -> why there is no message of it.

        Raises:
            RunError: a message is missing; the round is void.
        """
        missing = sorted({*self._total.cohort} - {*self._senders})
        if missing or self._so_far is None:
            reasons = "; ".join(f"{client_id}: {failed.get(client_id, 'no answer')}" for client_id in missing)
            raise RunError(
                f"round {self._total.round_num} is void: a secure sum opens only with the messages of all "
                f"{len(self._total.cohort)} sites ({reasons}); mend the sites and go on with resume=true, which "
                "repeats the round with the same sites"
            )
        flat = torch.from_numpy(opened(self._total, self._so_far, self._senders))
        change, start = {}, 0
        for name, shape in shapes.items():
            change[name] = flat[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return change
