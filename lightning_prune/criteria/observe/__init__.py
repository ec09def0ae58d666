"""Every hook on the user's model while it is scored.

Here: showing taps the tensors at their sites, one file per kind of site, and the sums of batches (`observer`);
auxiliary classifiers. Not here: what a criterion makes of the sums (one file per paper, a folder above).
"""
