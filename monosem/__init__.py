"""The front door: configuration, run folders, stages and the command line."""

__version__ = "0.1.0"
