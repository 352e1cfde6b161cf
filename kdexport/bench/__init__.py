"""Measuring: the engine, what can be measured, and the machine's facts."""
