from __future__ import annotations

from sfedlora.flower.protocol import Envelope
from sfedlora.flower.site import Site, SiteSettings


def ask_trainer(settings: SiteSettings, envelope: Envelope) -> Envelope:
    return Site(settings).answer(envelope)
