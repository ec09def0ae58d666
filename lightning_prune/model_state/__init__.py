"""A model's tensors, sizes, modes and random numbers: put back, copied, cut.

Here: what works on any module and its optimizers. Not here: anything that knows channels or plans.
"""
