"""Measuring: the engine, its subjects, statistics, loads and the machine's facts."""
