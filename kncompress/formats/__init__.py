"""What goes in and out of model folders: transformers, GGUF, merged safetensors, ONNX, LoRA; the model card.

This file stays empty: ``plugin`` is imported while transformers itself is still being imported.
"""
