"""Reports of runs: what the run folders hold, drawn and written as one page."""
