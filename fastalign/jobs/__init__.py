"""Whole jobs, from file to file: each command of the command line is one call here."""
