"""Adapters to other people's libraries, one file each; each imports its library only when it is called."""
