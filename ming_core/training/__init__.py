"""Training of LoRAs for a Ming-UniVision: `python -m ming_core.training lora`.

Without `lora` the command is the former name of `python -m tiny_shapes.training`, which trains the built-in model.
"""
