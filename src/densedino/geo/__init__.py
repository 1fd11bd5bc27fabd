"""Scenes with coordinates, in and out; rasterio lives only here."""
