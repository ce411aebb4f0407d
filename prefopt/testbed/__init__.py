"""Preference problems whose optimum is known exactly, their tiny models and their exact evaluators."""
