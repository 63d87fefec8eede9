"""HTTP: the REST interface, uploads, and the dashboard."""
