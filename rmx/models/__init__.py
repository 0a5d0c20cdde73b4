"""Loading a model, its prompts, its forward passes and its adapters."""
