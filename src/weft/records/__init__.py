"""A wing: what is written down about runs, and read again: folders, environment, report, charts."""
