"""LoRA training: objective, dataset and its cache, loss curve."""
