"""The command line: each command reads its options, calls what does the work and prints the result."""
