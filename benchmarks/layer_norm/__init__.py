"""What layer norms leave to be pruned, family by family, and what pruning under them costs on a real task."""
