"""An artifact behind HTTP: protocols that clients already speak, batching, and an orderly life and death."""
