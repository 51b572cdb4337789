"""Checks of promises that a test alone can't make: derivatives, kills, and the tests themselves."""
