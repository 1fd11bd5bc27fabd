"""Backbones: pure nn.Modules from one declarative table of specs; no I/O."""
