"""The commands as functions: run, export, bench, report, compare; each reads top to bottom."""
