"""The job: `python -m experiments.train --help`."""
