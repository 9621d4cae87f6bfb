"""The command line: each command reads its options, calls one job and prints what it gives."""
