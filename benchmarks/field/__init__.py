"""The field's benchmark: CIFAR ResNets at equal MACs and equal fine-tuning, our criteria and Torch-Pruning's."""
