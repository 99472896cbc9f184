"""`make generate`: pictures from a folder of published weights."""
