"""sfedlora: federated LoRA."""
