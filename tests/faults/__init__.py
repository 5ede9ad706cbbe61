"""What clusters do to runs, done on purpose; `make test-faults` prints the count."""
