"""Whole jobs, from file to file: what stands behind the commands that sample, score, choose, report and train."""
