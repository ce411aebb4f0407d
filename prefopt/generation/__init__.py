"""Engines that sample completions from a policy, behind one interface; `make` opens the one that the settings name."""
