"""Whole optimizers, learning rate included: the recipes of the papers."""
