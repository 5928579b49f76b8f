"""The dashboard: many reports as one page that works offline. Everything that is computed is computed here, from reports alone."""
