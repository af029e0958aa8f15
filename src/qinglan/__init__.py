"""Qinglan: align language models, also when the model outgrows its supervisors."""

__version__ = "0.1.0"
