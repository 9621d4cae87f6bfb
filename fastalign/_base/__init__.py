"""The base layer: errors, files, units, progress. It imports nothing from the packages above it."""
