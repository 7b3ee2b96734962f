"""`mdf benchmark`: an engine in, what its answers cost in time and memory out."""
