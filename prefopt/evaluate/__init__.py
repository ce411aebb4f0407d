"""What is measured of policies by their own samples: win rates, lengths, diversity, KL; with intervals."""
