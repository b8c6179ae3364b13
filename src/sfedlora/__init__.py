"""sfedlora: federated LoRA fine-tuning that stays stable at any rank and any number of clients.

from sfedlora import RunConfig, peft_config, run, scaling_factor
"""

from sfedlora.config import RunConfig as RunConfig
from sfedlora.experiment import RunResult as RunResult
from sfedlora.experiment import resume as resume
from sfedlora.experiment import run as run
from sfedlora.lora.scaling import effective_clients as effective_clients
from sfedlora.lora.scaling import peft_config as peft_config
from sfedlora.lora.scaling import scaling_factor as scaling_factor

__all__ = ["RunConfig", "RunResult", "effective_clients", "peft_config", "resume", "run", "scaling_factor"]
