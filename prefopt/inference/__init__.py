"""Answers from a policy as it is: samples, the best of them, and what it makes of them when it is asked to improve."""
