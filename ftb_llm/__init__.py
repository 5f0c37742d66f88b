"""Asynchronous LLM fine-tuning with f-Trajectory Balance."""

__version__ = "0.1.0"
