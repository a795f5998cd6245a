"""Settings every test shares."""

from hypothesis import settings

# Property tests run beside builds on small machines, where a deadline only measures the neighbours.
settings.register_profile("jaxkv", deadline=None, database=None)
settings.load_profile("jaxkv")
