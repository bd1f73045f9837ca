"""minigpt turns a text file into a small GPT. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
