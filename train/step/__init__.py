"""The training step on a mesh of devices; imports `train.config` and the types of `train.data`."""
