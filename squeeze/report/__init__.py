"""Reports: what was run, on what, and every raw value that was measured."""
