"""Prompts and files: what goes in and what comes out."""
