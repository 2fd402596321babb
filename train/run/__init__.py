"""A run on disk and on screen: data and programs together, training, checkpoints, metrics, report.

Imports `train.memory`, `train.step`, `train.data` and `train.config`; the commands import it.
"""
