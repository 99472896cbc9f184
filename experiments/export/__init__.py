"""A finished run made smaller or faster, measured, and written for programs without its code."""
