"""Figures of policies: win rates, texts, divergences on samples, each with its interval. Knows no run and no files."""
