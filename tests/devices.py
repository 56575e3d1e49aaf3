"""Several devices on one CPU."""
from lmlib.plan.fake_devices import environment as fake_devices

__all__ = ['fake_devices']
