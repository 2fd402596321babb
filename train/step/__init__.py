"""The training step: loss, gradient, update, and what a run computes with on a mesh of devices.

Imports `train.config`, and the types of `train.data`; reads no data and writes no file.
"""
