"""Rounds of generate, judge, pair and train, each stage a program with files on both sides."""
