"""Reports on finished runs: loading them, statistics over seeds, tables and pictures."""
