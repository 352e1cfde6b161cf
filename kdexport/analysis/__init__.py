"""What the data and the figures give away: duplicates, evidence for a gain, membership."""
