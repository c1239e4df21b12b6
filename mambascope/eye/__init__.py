"""MambaEye (arXiv 2511.19963), the size-agnostic causal encoder: model, data, training, evaluation, pictures."""
