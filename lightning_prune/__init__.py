"""Channel pruning for PyTorch Lightning: score, mask, and reconstruct a smaller model without loss."""
