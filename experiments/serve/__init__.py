"""`make serve` and `make bench-serve`: a finished run or published weights over HTTP."""
