"""Judges, behind one interface; `make` opens the one that the settings name. A judge never sees a thought."""
