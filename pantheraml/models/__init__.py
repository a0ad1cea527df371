"""Load a model to its place, swap in fused parts, attach LoRA."""
