"""Teacher, soft targets, student and training: the torch side. It meets the rest through folders only."""
