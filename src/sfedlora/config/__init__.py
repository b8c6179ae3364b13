"""The configuration of a run: schema, presets, YAML."""

from sfedlora.config.presets import PRESETS as PRESETS
from sfedlora.config.run_config import RunConfig as RunConfig
from sfedlora.config.run_config import apply_overrides as apply_overrides

__all__ = ["PRESETS", "RunConfig", "apply_overrides"]
