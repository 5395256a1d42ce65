"""Machines are shared and noisy: no property fails for the time that an example took."""

from hypothesis import settings

settings.register_profile("espalier", deadline=None)
settings.load_profile("espalier")
