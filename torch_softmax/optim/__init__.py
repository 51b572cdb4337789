"""Optimizers that go to the optimum: Newton's method."""
