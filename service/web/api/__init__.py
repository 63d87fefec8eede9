"""The REST interface under /api/v1 and the health pages: one application, a router for each subject."""
