"""The border to Flower: one federation across sites, from the same configuration and with the same code.

    protocol       what server and sites say to each other, and how it is checked
    records        Flower's records <-> envelopes
    site           what a site does; `site_store` keeps its B and head, `trainer` its base model between messages
    secure_round   rounds of which the server learns the sum alone; `secure_keys` reads a site's keys
    server         what the server does; `sites` knows who takes part
    client_app, server_app   the apps that Flower runs

Only `records`, `exchange`, `client_app` and `server_app` import flwr.
"""

from __future__ import annotations
