"""A run directory: what is written where, and how a run is found again.

Layout (format version 2; `checksums` says what version 1 lacked):

    config.yaml environment.json partition.json metrics.jsonl summary.json
    .owner                                           while a process works on it
    adapters/shared/  adapters/clients/<dir>/
    checkpoints/round-000003/{state.json, server.safetensors, clients.json, checksums.sha256}
    checkpoints/personal/000003/<dir>.safetensors    what client <dir> keeps, as it was after round 3
    checkpoints/optimizer/000003/<dir>.safetensors   its optimizer moments, where they are kept
    checkpoints/partial/{<dir>.safetensors, <dir>.json, checksums.sha256}   clients of an interrupted round

What belongs to one client (personal, optimizer, partial, adapters/clients) is open to the owner of the files alone. All
references are relative: a run directory may be moved and copied.
"""

from sfedlora.artifacts.adapters import AdapterFacts as AdapterFacts
from sfedlora.artifacts.adapters import adapter_facts as adapter_facts
from sfedlora.artifacts.adapters import write_served as write_served
from sfedlora.artifacts.checkpoints import Checkpoint as Checkpoint
from sfedlora.artifacts.checkpoints import Checkpoints as Checkpoints
from sfedlora.artifacts.checkpoints import CheckpointWriter as CheckpointWriter
from sfedlora.artifacts.client_files import ClientFiles as ClientFiles
from sfedlora.artifacts.partial import load_partial as load_partial
from sfedlora.artifacts.partial import remove_partial as remove_partial
from sfedlora.artifacts.partial import save_partial as save_partial
from sfedlora.artifacts.recovery import Recovered as Recovered
from sfedlora.artifacts.recovery import newest_intact as newest_intact
from sfedlora.artifacts.recovery import with_kept_best as with_kept_best
from sfedlora.artifacts.run_directory import RunDirectory as RunDirectory
from sfedlora.artifacts.write_behind import WriteBehind as WriteBehind

__all__ = [
    "AdapterFacts",
    "Checkpoint",
    "CheckpointWriter",
    "Checkpoints",
    "ClientFiles",
    "Recovered",
    "RunDirectory",
    "WriteBehind",
    "adapter_facts",
    "load_partial",
    "newest_intact",
    "remove_partial",
    "save_partial",
    "with_kept_best",
    "write_served",
]
