"""Accuracy of pruned CIFAR networks at the same measured latency, by selection."""
