"""Instruction fine-tuning at cluster scale: one recipe, from a laptop to hundreds of GPUs."""

__version__ = "0.1.0"
