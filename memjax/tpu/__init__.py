"""Compiling for TPU slices on a machine without a TPU, and what the compiled program tells.

`report.analyse(config, "v5p:4x4x4")` is the whole of it; `experiments/compile.py` the command line.
Call `target.prepare()` before anything else in the process.
"""
