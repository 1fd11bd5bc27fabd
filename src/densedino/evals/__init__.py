"""Owns evaluation: protocols, metrics, baselines, and runs that anyone can repeat."""
