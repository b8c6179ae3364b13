"""A run directory: what is written where, and how a run is found again.

Layout (schema version 1):

    config.yaml environment.json partition.json metrics.jsonl summary.json
    adapters/shared/  adapters/clients/<dir>/
    checkpoints/round-000003/{state.json, server.safetensors, clients.json}
    checkpoints/personal/000003/<dir>.safetensors    what client <dir> keeps, as it was after round 3
    checkpoints/optimizer/000003/<dir>.safetensors   its optimizer moments, where they are kept
    checkpoints/partial/<dir>.{safetensors,json}     clients that finished a round which was interrupted

All references are relative: a run directory may be moved and copied.
"""

from sfedlora.artifacts.adapters import AdapterFacts as AdapterFacts
from sfedlora.artifacts.adapters import adapter_facts as adapter_facts
from sfedlora.artifacts.adapters import write_served as write_served
from sfedlora.artifacts.checkpoints import Checkpoint as Checkpoint
from sfedlora.artifacts.checkpoints import Checkpoints as Checkpoints
from sfedlora.artifacts.checkpoints import CheckpointWriter as CheckpointWriter
from sfedlora.artifacts.client_files import ClientFiles as ClientFiles
from sfedlora.artifacts.partial import load_partial as load_partial
from sfedlora.artifacts.partial import save_partial as save_partial
from sfedlora.artifacts.run_directory import RunDirectory as RunDirectory
from sfedlora.artifacts.write_behind import WriteBehind as WriteBehind

__all__ = [
    "AdapterFacts",
    "Checkpoint",
    "CheckpointWriter",
    "Checkpoints",
    "ClientFiles",
    "RunDirectory",
    "WriteBehind",
    "adapter_facts",
    "load_partial",
    "save_partial",
    "write_served",
]
