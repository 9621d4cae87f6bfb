"""What all else stands on: errors, files, units, progress. It imports nothing of the packages above it."""
