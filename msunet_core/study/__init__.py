"""What notebooks and the command line share: profiles, runs, ablations, reports."""
