"""The content gate: policy and classifier."""
