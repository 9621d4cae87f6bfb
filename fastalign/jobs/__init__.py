"""Whole jobs, from file to file, behind the commands that sample, score, select, report and train."""
