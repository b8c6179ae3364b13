"""LoRA on one resident model: scaling, layers, flat adapter buffers, base models, PEFT files.

Nothing is exported here; import from the modules.
"""
