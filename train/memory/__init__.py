"""What a training step will take of a device's memory. Imports `train.step` and `train.config`."""
