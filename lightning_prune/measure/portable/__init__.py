"""Timing layers where there is neither torch nor this package: Python 3.8, numpy and the engine.

Here: ONNX files of single layers, which widths to time, timing them in turns. These files import one another and
numpy alone, since `write_profile_kit` copies them next to its `profile.py`.
"""
